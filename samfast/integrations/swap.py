# SPDX-License-Identifier: Apache-2.0
"""Change the class of a module in place to a derived class, and back.

The module stays the same object. It keeps its Parameters, names, hooks and places in other modules.
References in an optimizer or in its owner's code stay valid.
"""

import copyreg
import types
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from samfast.adapters.foreign import cache


class Swapped(NamedTuple):
    """The origin of a class.  methods: those of the stock class when the class was made"""

    stock: type[nn.Module]
    mixin: Any
    methods: dict[str, FunctionType]


@cache
def derived(stock: type[nn.Module], mixin: type) -> type[nn.Module]:
    """Return the class of ``mixin`` over ``stock``; there is one for each pair."""
    names = {
        "__module__": stock.__module__,
        "__doc__": mixin.__doc__,
        "__reduce_ex__": _reduce,
        "_samfast_swapped": Swapped(stock, mixin, methods_of(stock)),
    }
    name = f"Fused{stock.__name__}"
    return types.new_class(name, (mixin, stock), exec_body=lambda space: space.update(names))


def swap(module: nn.Module, mixin: type) -> None:
    """Give a module the derived class; its forward is then the mixin's.

    What an earlier forward of the owner's left behind is dropped: nothing would renew it.
    """
    module.__class__ = derived(type(module), mixin)
    for name in getattr(mixin, "stores", ()):
        vars(module).pop(name, None)


def swapped(module: nn.Module) -> Swapped | None:
    """Return the origin of the module's class, also if a wrapper derived another from it."""
    return getattr(type(module), "_samfast_swapped", None)


def made_of(kind: Any) -> Swapped:
    """Return the origin of a class of ``derived``, or of a wrapper's class over one."""
    made_of: Swapped = kind._samfast_swapped
    return made_of


def patched(module: nn.Module) -> str | None:
    """Name a method that the stock class or the module replaced since the swap."""
    stock, _, methods = made_of(type(module))
    for name, method in methods.items():
        if getattr(stock, name, None) is not method:
            return name
    return own_method(module, methods)


# torch.compile calls this while tracing, and does not trace it.
patched._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it


def methods_of(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """Return a class's methods by name, with __call__ but without torch's other methods."""
    names = {name for base in kind.__mro__ if base is not nn.Module for name in vars(base)}
    found = ((name, getattr(kind, name, None)) for name in sorted(names | {"__call__"}))
    return {name: method for name, method in found if isinstance(method, FunctionType)}


def foreign_method(kind: type[nn.Module]) -> str | None:
    """Name a method of a library's class that was written outside the library.

    Decorators of torch and of Python, such as no_grad, do not count.
    """
    known = kind.__module__.partition(".")[0], "torch", "contextlib", "functools"
    for name, method in methods_of(kind).items():
        for function in _wrapped(method):
            if function.__globals__.get("__name__", "").partition(".")[0] not in known:
                return name
    return None


def _wrapped(function: FunctionType) -> Iterator[FunctionType]:
    """Yield a function and the functions that it wraps."""
    inner: Any = function
    while isinstance(inner, FunctionType):
        yield inner
        inner = getattr(inner, "__wrapped__", None)


def own_method(module: nn.Module, methods: dict[str, FunctionType]) -> str | None:
    """Name a method of its class that an instance has replaced."""
    own = vars(module)
    if methods.keys().isdisjoint(own):
        return None
    return next(name for name in methods if name in own)


def is_swapped(module: nn.Module) -> bool:
    """True if the module's class is one of ``derived`` itself, not a wrapper's."""
    return "_samfast_swapped" in vars(type(module))


def swap_back(module: nn.Module) -> None:
    module.__class__ = made_of(type(module)).stock


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle as the stock class does; loading makes the derived class anew."""
    stock, mixin, _ = made_of(type(self))
    above: Any = super(mixin, self)
    make, arguments, *rest = above.__reduce_ex__(max(protocol, 2))
    new = copyreg.__newobj__  # type: ignore[attr-defined]  # pickle and copy look for it
    if is_swapped(self) and make is new and arguments[0] is type(self):
        make, arguments = _new, (stock, mixin, *arguments[1:])
    return make, arguments, *rest


def _new(stock: type[nn.Module], mixin: type, *arguments: Any) -> nn.Module:
    kind: Any = derived(stock, mixin)
    made: nn.Module = kind.__new__(kind, *arguments)
    return made
