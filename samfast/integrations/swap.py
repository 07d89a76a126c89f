# SPDX-License-Identifier: Apache-2.0
"""The class of a module changed in place, to one derived from the class that it has, and back.

The module stays the object that it is. Its Parameters, names, hooks and places in other modules
stay with it, and so does whatever an optimizer or its owner's code holds of it.
"""

import copyreg
import functools
import types
from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Swapped(NamedTuple):
    """What a class was made of."""

    stock: type[nn.Module]
    mixin: type
    forward: Callable  # the stock class's, when this was made


@functools.cache
def derived(stock: type[nn.Module], mixin: type) -> type[nn.Module]:
    """The class that runs as ``mixin`` says and otherwise as ``stock``; one for each pair."""
    names = {
        "__module__": stock.__module__,
        "__doc__": mixin.__doc__,
        "__reduce_ex__": _reduce,
        "_samfast_swapped": Swapped(stock, mixin, stock.forward),
    }
    name = f"Fused{stock.__name__}"
    return types.new_class(name, (mixin, stock), exec_body=lambda space: space.update(names))


def swap(module: nn.Module, mixin: type) -> None:
    """Give a module the class derived from its own; its forward then is the mixin's."""
    module.__class__ = derived(type(module), mixin)


def swapped(module: nn.Module) -> Swapped | None:
    """What the module's class was made of, also inside a class that a wrapper made of it."""
    return getattr(type(module), "_samfast_swapped", None)


def patched(module: nn.Module) -> bool:
    """Whether the stock class of a swapped module has another forward since."""
    made_of = type(module)._samfast_swapped
    return made_of.stock.forward is not made_of.forward


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's class is one of ``derived``, and no wrapper's."""
    return "_samfast_swapped" in vars(type(module))


def swap_back(module: nn.Module) -> None:
    module.__class__ = type(module)._samfast_swapped.stock


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """As the stock class pickles, but that the class is made anew where it is loaded."""
    stock, mixin, _ = type(self)._samfast_swapped
    make, arguments, *rest = super(mixin, self).__reduce_ex__(max(protocol, 2))
    if is_swapped(self) and make is copyreg.__newobj__ and arguments[0] is type(self):
        make, arguments = _new, (stock, mixin, *arguments[1:])
    return make, arguments, *rest


def _new(stock: type[nn.Module], mixin: type, *arguments):
    kind = derived(stock, mixin)
    return kind.__new__(kind, *arguments)
