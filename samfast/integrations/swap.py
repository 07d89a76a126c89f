# SPDX-License-Identifier: Apache-2.0
"""The class of a module changed in place, to one derived from the class that it has, and back.

The module stays the object that it is. Its Parameters, names, hooks and places in other modules
stay with it, and so does whatever an optimizer or its owner's code holds of it.
"""

import copyreg
import functools
import types
from collections.abc import Iterator
from types import FunctionType
from typing import NamedTuple

from torch import nn


class Swapped(NamedTuple):
    """What a class was made of.  methods: the stock class's own and inherited, when it was made"""

    stock: type[nn.Module]
    mixin: type
    methods: dict[str, FunctionType]


@functools.cache
def derived(stock: type[nn.Module], mixin: type) -> type[nn.Module]:
    """The class that runs as ``mixin`` says and otherwise as ``stock``; one for each pair."""
    names = {
        "__module__": stock.__module__,
        "__doc__": mixin.__doc__,
        "__reduce_ex__": _reduce,
        "_samfast_swapped": Swapped(stock, mixin, methods_of(stock)),
    }
    name = f"Fused{stock.__name__}"
    return types.new_class(name, (mixin, stock), exec_body=lambda space: space.update(names))


def swap(module: nn.Module, mixin: type) -> None:
    """Give a module the class derived from its own; its forward then is the mixin's."""
    module.__class__ = derived(type(module), mixin)


def swapped(module: nn.Module) -> Swapped | None:
    """What the module's class was made of, also inside a class that a wrapper made of it."""
    return getattr(type(module), "_samfast_swapped", None)


def patched(module: nn.Module) -> str | None:
    """A method that the stock class of a swapped module, or the module, has another of since."""
    stock, _, methods = type(module)._samfast_swapped
    for name, method in methods.items():
        if getattr(stock, name, None) is not method:
            return name
    return own_method(module, methods)


# What torch.compile calls while it traces, rather than trace it.
patched._dynamo_marked_constant = True


def methods_of(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """Its methods by name, and how it is called, but nothing else of torch's Module."""
    names = {name for base in kind.__mro__ if base is not nn.Module for name in vars(base)}
    found = ((name, getattr(kind, name, None)) for name in sorted(names | {"__call__"}))
    return {name: method for name, method in found if isinstance(method, FunctionType)}


def foreign_method(kind: type[nn.Module]) -> str | None:
    """The name of a method of a library's class that was written outside the library.

    Decorators of torch and of Python, such as no_grad, are no one's.
    """
    known = kind.__module__.partition(".")[0], "torch", "contextlib", "functools"
    for name, method in methods_of(kind).items():
        for function in _wrapped(method):
            if function.__globals__.get("__name__", "").partition(".")[0] not in known:
                return name
    return None


def _wrapped(function: FunctionType) -> Iterator[FunctionType]:
    """A function and what it says that it wraps."""
    while isinstance(function, FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


def own_method(module: nn.Module, methods: dict[str, FunctionType]) -> str | None:
    """The name of one of its class's methods that an instance has another of."""
    own = vars(module)
    if methods.keys().isdisjoint(own):
        return None
    return next(name for name in methods if name in own)


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's class is one of ``derived``, and no wrapper's."""
    return "_samfast_swapped" in vars(type(module))


def swap_back(module: nn.Module) -> None:
    """Give the module its stock class again."""
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
