# SPDX-License-Identifier: Apache-2.0
"""Watch the code of a library's classes: notice that a part was replaced after it was proven."""

import dis
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from operator import is_
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from samfast.integrations.swap import foreign_method, methods_of

_BESIDES = ("torch", "contextlib", "functools", "math", "typing", "numpy", "builtins")
_OF_TORCH = ("forward", "_conv_forward", "__call__")
_ABSENT = object()


class CodeWatch:
    """All that methods of some classes reach by name, as it was when this was made.

    kinds: classes of one module   torchs: classes of torch that they call

    It holds functions, their defaults and closures, and their globals. Of modules and of other
    classes among the globals it holds the attributes whose names the code has.

    methods: names of all methods of these classes
    replaced: name of a part that is neither the library's nor torch's; None if there is none
    key: differs when a part was replaced, as long as this object is kept
    """

    def __init__(self, kinds: Iterable[Any], torchs: Iterable[type[nn.Module]] = ()):
        kinds = list(kinds)
        self._home = kinds[0].__module__
        self._known = {self._home.partition(".")[0], *_BESIDES}
        self._entries: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._seen: set[Any] = set()
        self.methods: set[str] = set()
        self.replaced: str | None = None
        for kind in kinds:
            self._kind(kind)
        for kind in torchs:
            for name in _OF_TORCH:
                self._method(kind, name)
        by_read: dict[Callable[..., Any], list[Any]] = {}
        for read, *entry in self._entries.values():
            by_read.setdefault(read, []).append(entry)
        self._columns: list[Any] = [
            (read, *zip(*rows, strict=True)) for read, rows in by_read.items()
        ]
        self.key = tuple(id(value) for *_, value in self._entries.values())

    def unchanged(self) -> bool:
        """Say if everything is what it was; a layer asks at each forward, so it is quick."""
        for read, holders, names, values in self._columns:
            if not all(map(is_, map(read, holders, names, repeat(_ABSENT)), values)):
                return False
        return True

    def _watch(self, read: Callable[..., Any], holder: Any, name: str) -> Any:
        place = read, id(holder), name
        if place not in self._entries:
            value = read(holder, name, _ABSENT)
            if read(holder, name, _ABSENT) is not value:  # it is made at each look
                return value
            self._entries[place] = read, holder, name, value
        return self._entries[place][-1]

    def _kind(self, kind: Any) -> None:
        if kind in self._seen:
            return
        self._seen.add(kind)
        if not isinstance(kind, type) or kind.__module__ != self._home:
            self._replaced(getattr(kind, "__name__", type(kind).__name__))
            return
        if (method := foreign_method(kind)) is not None:
            self._replaced(f"{kind.__name__}.{method}")
        self.methods |= methods_of(kind).keys()
        for name in methods_of(kind):
            self._method(kind, name)

    def _method(self, kind: Any, name: str) -> None:
        method = self._watch(getattr, kind, name)
        if not isinstance(method, FunctionType):
            return
        if not self._trusted(method):
            self._replaced(f"{kind.__name__}.{name}")
        if name != "__call__":
            self._function(method, kind)

    def _function(self, function: FunctionType, kind: Any = None) -> None:
        if (function, kind) in self._seen:
            return
        self._seen.add((function, kind))
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self._watch(getattr, function, name)
        for cell in function.__closure__ or ():
            if isinstance(inner := self._watch(getattr, cell, "cell_contents"), FunctionType):
                self._function(inner, kind)
        home = _origin(function) == self._home
        if not home and function.__name__ not in _OF_TORCH:
            return
        taken, read = _names(function.__code__)
        for name in sorted(taken & function.__globals__.keys()):
            value = self._watch(dict.get, function.__globals__, name)
            if home or isinstance(value, ModuleType):
                self._value(name, value, read, home)
        if kind is not None and kind.__module__ == self._home:
            for name in read:  # a property may come to stand before an attribute
                self._watch(getattr, kind, name)

    def _value(self, name: str, value: Any, read: set[str], checked: bool) -> None:
        home = _origin(value)
        if not self._trusted(value):
            if checked or isinstance(value, FunctionType):
                self._replaced(name)
        elif isinstance(value, FunctionType) and home == self._home:
            self._function(value)
        elif isinstance(value, type) and home == self._home:
            self._kind(value)
        elif isinstance(value, ModuleType):
            for inner in sorted(read & vars(value).keys()):
                found = self._watch(dict.get, vars(value), inner)
                self._value(f"{name}.{inner}", found, read, checked)
        elif isinstance(value, type):
            for inner in sorted(read & {n for base in value.__mro__ for n in vars(base)}):
                self._watch(getattr, value, inner)

    def _trusted(self, value: Any) -> bool:
        return _origin(value).partition(".")[0] in self._known

    def _replaced(self, name: str) -> None:
        self.replaced = self.replaced or name


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """Return the names of globals and of attributes in a code and in those inside it."""
    taken: set[str] = set()
    read: set[str] = set()
    for inner in _codes(code):
        for instruction in dis.get_instructions(inner):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                taken.add(instruction.argval)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                read.add(instruction.argval)
    return taken, read


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _origin(value: Any) -> str:
    """Return the name of the module that a value comes from."""
    if isinstance(value, FunctionType):
        return str(value.__globals__.get("__name__", ""))
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, BuiltinFunctionType):
        return "builtins"
    return (value if isinstance(value, type) else type(value)).__module__
