# SPDX-License-Identifier: Apache-2.0
"""Check that a forward uses only its module, torch's functions and numbers.

Code that reads a flag, a list or another module may change its behaviour later, and a run does not
show it. So every name in the code is looked up, and everything behind the names is watched.
"""

import dis
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from operator import is_
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

# What segment_anything's blocks, and equal ones, use of tensors and of torch.
TENSORS = frozenset(
    "T add arange baddbmm bmm cat chunk concat contiguous device dim div einsum expand flatten "
    "float functional gelu interpolate layer_norm linear long mT matmul mm movedim mul ndim "
    "new_zeros nn pad permute repeat reshape roll scaled_dot_product_attention shape size softmax "
    "split squeeze stack sub transpose unbind unflatten unsqueeze view zeros".split()
)
_BUILTINS = frozenset(
    "abs float hasattr int isinstance len list max min range round str tuple zip "
    "Exception NotImplementedError RuntimeError ValueError".split()
)
_WRITES = ("STORE_SUBSCR", "STORE_SLICE")
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
_MODULES = ("torch", "torch.nn", "torch.nn.functional", "math")
_NUMBERS = (bool, int, float, str, type(None))
_ABSENT = object()
Watched = tuple[Callable[..., Any], Any, str, Any]  # how, where and what was read, and its value
LARGEST_NUMBER = 5  # segment_anything permutes five dimensions; runs use larger maps


class PlainCode:
    """The forward of a class, read again only when something that it uses was replaced.

    names: attributes of the class's modules and their parts that it may read
    writes: True if it may write to a part of a tensor, ``t[...] = u``; a run with gradients shows
        if the tensor is its input
    stores: attributes that it may set, and read after it has set them in any case
    methods: of its class that it may call
    """

    def __init__(
        self,
        kind: type[nn.Module],
        names: frozenset[str],
        writes: bool = False,
        stores: frozenset[str] = frozenset(),
        methods: frozenset[str] = frozenset(),
    ):
        self.kind, self.names, self.writes = kind, names | stores, writes
        self.stores, self.methods = stores, methods
        self.bases = [vars(c) for c in kind.__mro__ if c not in (nn.Module, object)]
        self.code = -1
        self.problem: str | None = None
        self._known: dict[tuple[Any, ...], int] = {}

    def __call__(self) -> tuple[int, str | None]:
        """Return a number for this state of the code, and what is not plain in it."""
        if self.code < 0 or not self._unchanged():
            self._read()
        return self.code, self.problem

    def _on_class(self) -> list[bool]:
        """Say for the class and each of its bases if it has an attribute that is read."""
        return [not self.attributes.isdisjoint(names) for names in self.bases]

    def _read(self) -> None:
        self.watched: list[Watched] = []
        self.attributes: set[str] = set()
        self.seen: set[FunctionType] = set()
        found: list[Any] = []
        try:
            call = self._watch(getattr, self.kind, "__call__")
            if call is not nn.Module.__call__:
                raise _NotPlain(f"{self.kind.__name__} has a __call__ of its own")
            self._function(self._watch(getattr, self.kind, "forward"), found)
            self.problem = None
        except _NotPlain as problem:
            self.problem = str(problem)
        self.on_class = self._on_class()
        self._unchanged = unchanged([self])
        if self.problem is None and any(self.on_class):
            held = sorted(n for n in self.attributes if any(n in names for names in self.bases))
            self.problem = str(self._uses(f"{held[0]} of its class"))
        self.code = self._known.setdefault(tuple(found), len(self._known))

    def _watch(self, read: Callable[..., Any], holder: Any, name: str) -> Any:
        value = read(holder, name, _ABSENT)
        self.watched.append((read, holder, name, value))
        return value

    def _look_up(self, names: dict[str, Any], name: str) -> Any:
        return self._watch(dict.get, names, name)

    def _function(self, function: Any, found: list[Any]) -> None:
        if not isinstance(function, FunctionType):
            raise self._uses(f"a {type(function).__name__} in place of a function")
        if function in self.seen:
            return
        self.seen.add(function)
        code = self._watch(getattr, function, "__code__")
        found.append(code)
        for values in ("__defaults__", "__kwdefaults__"):
            given = self._watch(getattr, function, values) or ()
            self._numbers(given.values() if isinstance(given, dict) else given, found)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._value(name, self._watch(_content, cell, name), found)
        modules: list[ModuleType] = []
        for inner in _codes(code):
            self._instructions(function, inner, modules, found)
            self._order(inner)

    def _instructions(
        self, function: FunctionType, code: CodeType, modules: list[ModuleType], found: list[Any]
    ) -> None:
        for value in code.co_consts:
            self._small(value)
        for instruction in dis.get_instructions(code):
            kind, name = instruction.opname, instruction.argval
            if kind in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._global(function, name, modules, found)
                if name == "hasattr":
                    self._asked(function, code)
            elif self.writes and kind in _WRITES:
                continue
            elif kind in ("LOAD_ATTR", "LOAD_METHOD"):
                self._attribute(name, modules, found)
            elif kind == "STORE_ATTR" and name in self.stores:
                self.attributes.add(name)
            elif "SUPER" in kind or kind.startswith(("STORE_", "DELETE_", "IMPORT_")):
                if not kind.startswith(("STORE_FAST", "DELETE_FAST", "STORE_DEREF")):
                    raise self._uses(f"{kind.lower().replace('_', ' ')} {name or ''}".strip())

    def _global(
        self, function: FunctionType, name: str, modules: list[ModuleType], found: list[Any]
    ) -> None:
        value = self._look_up(function.__globals__, name)
        if value is _ABSENT:
            if name not in _BUILTINS:
                raise self._uses(name)
        elif isinstance(value, ModuleType) and value.__name__ in _MODULES:
            modules.append(value)
        else:
            self._value(name, value, found)

    def _asked(self, function: FunctionType, code: CodeType) -> None:
        """Return what hasattr may ask for: any text in the code except docstrings."""
        for text in code.co_consts:
            if isinstance(text, str) and text != function.__doc__:
                if text not in self.names or text in self.stores:
                    raise self._uses(f"hasattr, and {text!r}")
                self.attributes.add(text)

    def _order(self, code: CodeType) -> None:
        """Refuse to read one of ``stores`` that an earlier forward may have left behind."""
        surely: set[str] = set()
        passed = 0  # the furthest that an instruction so far may jump
        guarded = bool(getattr(code, "co_exceptiontable", b""))
        for step in dis.get_instructions(code) if self.stores else ():
            if step.opcode in _JUMPS:
                passed = max(passed, step.argval)
            if step.argval not in self.stores:
                continue
            if step.opname == "STORE_ATTR":
                if guarded or step.offset < passed:
                    raise self._uses(f"{step.argval}, which it does not set at each call")
                surely.add(step.argval)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval not in surely:
                raise self._uses(f"{step.argval} before it is set")

    def _attribute(self, name: str, modules: list[ModuleType], found: list[Any]) -> None:
        if name in self.methods:
            self._function(self._watch(getattr, self.kind, name), found)
            return
        if name not in TENSORS and name not in self.names:
            raise self._uses(name)
        self.attributes.add(name)
        for module in tuple(modules):
            value = self._look_up(vars(module), name)
            if isinstance(value, ModuleType):
                if value.__name__.partition(".")[0] != "torch":
                    raise self._uses(f"{module.__name__}.{name}, which was replaced")
                if value.__name__ in _MODULES and value not in modules:
                    modules.append(value)  # nn.functional, of which the code takes a function
            if isinstance(value, FunctionType) and not _of_torch(value):
                raise self._uses(f"{module.__name__}.{name}, which was replaced")
            found.append(_Same(value))

    def _value(self, name: str, value: Any, found: list[Any]) -> None:
        if _of_torch(value):
            if value.__name__ not in TENSORS:
                raise self._uses(name)
            found.append(_Same(value))
        elif isinstance(value, FunctionType):
            self._function(value, found)
        elif isinstance(value, _NUMBERS):
            self._numbers((value,), found)
        elif _is_autograd_function(value):
            for part in ("forward", "backward"):
                self._function(self._watch(getattr, value, part), found)
        elif value is torch.autograd.Variable:
            found.append(_Same(value))
        else:
            raise self._uses(f"{name}, a {type(value).__name__}")

    def _numbers(self, values: Iterable[Any], found: list[Any]) -> None:
        for value in values:
            if not isinstance(value, _NUMBERS):
                raise self._uses(f"a {type(value).__name__}")
            self._small(value)
            found.append((type(value), repr(value)))

    def _small(self, value: Any) -> None:
        """Refuse a large number: it may be a size above which the code does something else."""
        if isinstance(value, (int, float)) and abs(value) > LARGEST_NUMBER:
            raise self._uses(f"the number {value}")

    def _uses(self, what: str) -> "_NotPlain":
        return _NotPlain(f"the forward of {self.kind.__name__} uses {what}")


def unchanged(codes: Sequence[PlainCode]) -> Callable[[], bool]:
    """Return a function that says if these codes, once read, are unchanged.

    A block asks at each forward, so it uses Python's built-in loops.
    """
    by_read: dict[Callable[..., Any], list[Any]] = {}
    for read, *entry in (entry for code in codes for entry in code.watched):
        by_read.setdefault(read, []).append(entry)
    columns: list[Any] = [(read, *zip(*entries, strict=True)) for read, entries in by_read.items()]
    on_class = [(code.attributes.isdisjoint, names) for code in codes for names in code.bases]
    before = [disjoint(names) for disjoint, names in on_class]

    def same() -> bool:
        for read, holders, names, values in columns:
            if not all(map(is_, map(read, holders, names, repeat(_ABSENT)), values)):
                return False
        return before == [disjoint(names) for disjoint, names in on_class]

    return same


class _NotPlain(Exception):
    pass


class _Same:
    """Equals another that holds the same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _of_torch(value: Any) -> bool:
    """True for a function that torch defines, in Python or in C++."""
    if isinstance(value, FunctionType):
        name = value.__globals__.get("__name__", "")
    else:
        name = (isinstance(value, type(len)) and value.__module__) or ""
    return name.partition(".")[0] == "torch"


def _is_autograd_function(value: Any) -> bool:
    """True for a class of torch.autograd.Function with only a forward and a backward."""
    if not isinstance(value, type) or value.__mro__[1:2] != (torch.autograd.Function,):
        return False
    methods = {name for name, part in vars(value).items() if callable(part) and name[0] != "_"}
    return methods == {"forward", "backward"}


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and that of the functions inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _content(cell: CellType, name: str, default: object) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return default
