# SPDX-License-Identifier: Apache-2.0
"""The class of a module changed in place, to one derived from the class that it has, and back.

The module stays the object that it is. Its Parameters, names, hooks and places in other modules
stay with it, and so does whatever an optimizer or its owner's code holds of it.
"""

import copyreg
import types
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from samfast.adapters.foreign import cache


class Swapped(NamedTuple):
    """What a class was made of.  methods: the stock class's own and inherited, when it was made"""

    stock: type[nn.Module]
    mixin: Any
    methods: dict[str, FunctionType]


@cache
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


def made_of(kind: Any) -> Swapped:
    """What a class of ``derived`` was made of, or the class of a wrapper around one."""
    made_of: Swapped = kind._samfast_swapped
    return made_of


def patched(module: nn.Module) -> str | None:
    """A method that the stock class of a swapped module, or the module, has another of since."""
    stock, _, methods = made_of(type(module))
    for name, method in methods.items():
        if getattr(stock, name, None) is not method:
            return name
    return own_method(module, methods)


# What torch.compile calls while it traces, rather than trace it.
patched._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it


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
    inner: Any = function
    while isinstance(inner, FunctionType):
        yield inner
        inner = getattr(inner, "__wrapped__", None)


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
    module.__class__ = made_of(type(module)).stock


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """As the stock class pickles, but that the class is made anew where it is loaded."""
    stock, mixin, _ = made_of(type(self))
    above: Any = super(mixin, self)
    make, arguments, *rest = above.__reduce_ex__(max(protocol, 2))
    new = copyreg.__newobj__  # type: ignore[attr-defined]  # what pickle and copy look for
    if is_swapped(self) and make is new and arguments[0] is type(self):
        make, arguments = _new, (stock, mixin, *arguments[1:])
    return make, arguments, *rest


def _new(stock: type[nn.Module], mixin: type, *arguments: Any) -> nn.Module:
    kind: Any = derived(stock, mixin)
    made: nn.Module = kind.__new__(kind, *arguments)
    return made
