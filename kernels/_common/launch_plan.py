# SPDX-License-Identifier: Apache-2.0
"""The calls of an operator's body, prepared once and repeated on other tensors of the same kind.

A plan is a function without branches, written out for one recording: allocations, calls of aten,
launches, and when each tensor is dropped. Triton's compiled launchers start the kernels with
pointers filled in, so that no argument is inspected again. ``plan.source`` shows the text.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime import driver

from samfast.kernels._common.ranges import Range
from samfast.kernels._common.recorder import Call, Launch, Part, Recording
from samfast.kernels._common.recorder import Range as RangeRecord

_ALLOCATIONS = frozenset("empty new_empty empty_like empty_strided new_empty_strided".split())
# The same by a shorter way than an operator's own.
_SHORT = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.linear.default: F.linear,
}
zeroed = False  # whether new memory is torch.empty_strided's, for a stand-in that fills it


def empty_strided(device: torch.device) -> Callable:
    """The function that makes a tensor of a size, stride and dtype on this device, the current one.

    Compiled graphs call it too; it costs a third of the public function.
    """
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if quick is not None and not zeroed:
        return quick
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


class LaunchPlan:
    """A recording's calls as a function of its inputs.

    tensors: the inputs, in their order. It keeps none of the recording's, only their alignment to
        16 bytes.   ranged: with ranges for profilers

    Returns new tensors like those that the recorded body returned, or NotImplemented for inputs of
    another alignment.
    Raises ValueError when the recording says that it cannot be repeated.
    """

    _made = 0

    def __init__(self, recording: Recording, tensors: Sequence[Tensor | None]):
        if recording.problem is not None:
            raise ValueError(recording.problem)
        self.compiled = any(getattr(call, "compiled", None) for call in recording.calls)
        self._writer = _Writer(recording, tensors)
        self.source = self._writer.text(False)
        LaunchPlan._made += 1
        self._name = f"launch plan {LaunchPlan._made}"
        self.run = _function(self.source, self._writer.known, self._name)
        self._ranged: Callable | None = None

    def __call__(self, tensors: Sequence[Tensor | None], ranged: bool = False) -> Any:
        stream = None
        if self.compiled:
            active = driver.active
            stream = active.get_current_stream(active.get_current_device())
        if not ranged:
            return self.run(tensors, stream, None)
        if self._ranged is None:
            name = f"{self._name} with ranges"
            self._ranged = _function(self._writer.text(True), self._writer.known, name)
        opened: list[Range] = []
        try:
            return self._ranged(tensors, stream, opened)
        finally:
            while opened:
                opened.pop().__exit__(None, None, None)


class _Source:
    """Where a traceback finds the lines of a plan."""

    def __init__(self, text: str):
        self.text = text

    def get_source(self, name: str) -> str:
        return self.text


def _function(source: str, known: dict, name: str) -> Callable:
    space = {**known, "__name__": name, "__loader__": _Source(source)}
    exec(compile(source, name, "exec"), space)
    return space["plan"]


class _Writer:
    """Writes a recording's calls. known: what the text has names for, by name"""

    def __init__(self, recording: Recording, tensors: Sequence[Tensor | None]):
        self.recording = recording
        self.known: dict[str, Any] = {"Range": Range, "leaves": tree_leaves}
        self._names: dict[int, str] = {}
        self.pointed = {
            value.root
            for record in recording.calls
            if isinstance(record, Launch) and record.compiled is not None
            for value in record.values.values()
            if isinstance(value, Part)
        }
        pointed = [i for i in range(recording.inputs) if i in self.pointed]
        self.alignment = {i: tensors[i].data_ptr() % 16 for i in pointed}
        self.last = _last_uses(recording)
        self.roots = _as_used(recording)

    def text(self, ranged: bool) -> str:
        self.views: dict[Part, str] = {}
        self.lines: list[str] = []
        inputs = range(self.recording.inputs)
        self.lines.append(f"[{', '.join(f't{i}' for i in inputs)}] = tensors")
        self.lines += [f"p{i} = t{i}.data_ptr()" for i in self.alignment]
        for odd in sorted(set(self.alignment.values())):
            alike = [f"p{i}" for i, rest in self.alignment.items() if rest == odd]
            one = f"({' | '.join(alike)}) & 15 != {odd}"
            every = f"({' & '.join(alike)}) & 15 != {odd}"
            self.lines.append(f"if {one}{f' or {every}' if odd else ''}: return NotImplemented")
        for i, record in enumerate(self.recording.calls):
            if isinstance(record, RangeRecord):
                self.lines += self._range(record.label) if ranged else []
                continue
            self._call(record) if isinstance(record, Call) else self._launch(record)
            if done := self.last.get(i):
                names = [f"t{root}" for root in done]
                names += [name for part, name in self.views.items() if part.root in done]
                self.views = {p: n for p, n in self.views.items() if p.root not in done}
                self.lines.append(f"del {', '.join(names)}")
        result = self._value(self.recording.result)
        body = "".join(f"    {line}\n" for line in [*self.lines, f"return {result}"])
        return f"def plan(tensors, stream, opened):\n{body}"

    def _range(self, label: str | None) -> list[str]:
        if label is None:
            return ["opened.pop().__exit__(None, None, None)"]
        return [f"opened.append(Range({label!r}))", "opened[-1].__enter__()"]

    def _call(self, record: Call) -> None:
        packet = record.function._overloadpacket.__name__
        if packet in _ALLOCATIONS:
            (root,) = record.made
            part, device = self.roots[root], self.recording.devices[root]
            make = self._known(empty_strided(device), f"empty_{device.type}")
            values = ", ".join(map(self._value, (part.size, part.stride, part.dtype)))
            self._made(f"{make}({values})", [root])
            return
        function = self._known(_SHORT.get(record.function, record.function), packet)
        values = [self._value(v) for v in record.args]
        values += [f"{name}={self._value(v)}" for name, v in record.kwargs.items()]
        self._made(f"{function}({', '.join(values)})", record.made)

    def _made(self, call: str, made: list[int | None]) -> None:
        """A line that calls, and names what it made."""
        if made == [root for root in made if root is None]:
            self.lines.append(call)
            return
        if len(made) == 1:
            self.lines.append(f"t{made[0]} = {call}")
        else:
            names = ", ".join("_" if root is None else f"t{root}" for root in made)
            self.lines.append(f"{names} = leaves({call})")
        self.lines += [f"p{root} = t{root}.data_ptr()" for root in made if root in self.pointed]

    def _launch(self, record: Launch) -> None:
        kernel = record.compiled
        if kernel is None:
            values = {"grid": record.grid, "warmup": False, **record.values, **record.options}
            text = ", ".join(f"{name}={self._value(v)}" for name, v in values.items())
            self.lines.append(f"{self._known(record.kernel.run, record.kernel.__name__)}({text})")
            return
        name = record.kernel.__name__
        text = [
            *map(str, (*record.grid, 1, 1)[:3]), "stream",
            self._known(kernel.function, f"{name}_function"),
            self._known(kernel.packed_metadata, f"{name}_metadata"),
            "None", "None", "None",
        ]  # fmt: skip
        text += [self._pointer(v) if isinstance(v, Part) else self._value(v)
                 for v in record.values.values()]  # fmt: skip
        self.lines.append(f"{self._known(kernel.run, name)}({', '.join(text)})")

    def _pointer(self, part: Part) -> str:
        return f"p{part.root} + {part.offset}" if part.offset else f"p{part.root}"

    def _value(self, value: Any) -> str:
        """What stands for a value in the text."""
        if isinstance(value, Part):
            return self._tensor(value)
        if type(value) in (list, tuple):
            inner = "".join(f"{self._value(v)}, " for v in value)
            return f"[{inner[:-2]}]" if type(value) is list else f"({inner})"
        if isinstance(value, (bool, int, str, type(None))):
            return repr(value)
        if isinstance(value, float) and math.isfinite(value):
            return repr(value)
        return self._known(value, type(value).__name__)

    def _tensor(self, part: Part) -> str:
        """The root, or a name for a part of it."""
        own, root = self.roots[part.root], f"t{part.root}"
        whole = own.offset, own.size, own.stride, own.dtype
        if (part.offset, part.size, part.stride, part.dtype) == whole:
            return root
        if part not in self.views:
            name = self.views[part] = f"v{len(self.lines)}"
            if part.dtype != own.dtype:
                root = f"{root}.view({self._value(part.dtype)})"
            start = f"{root}.storage_offset() + " if part.root < self.recording.inputs else ""
            places = self._value(part.size), self._value(part.stride)
            offset = f"{start}{part.offset // part.dtype.itemsize}"
            self.lines.append(f"{name} = {root}.as_strided({', '.join(places)}, {offset})")
        return self.views[part]

    def _known(self, value: Any, name: str) -> str:
        """The name of an object."""
        if id(value) not in self._names:
            name = "".join(c if c.isalnum() else "_" for c in name)
            name = f"{name}_{len(self.known)}" if name in self.known else name
            self._names[id(value)], self.known[name] = name, value
        return self._names[id(value)]


def _as_used(recording: Recording) -> list[Part]:
    """The roots; one that is allocated has the shape in which all others than launches take it."""
    roots, uses = list(recording.roots), {}
    for record in recording.calls:
        if isinstance(record, Call):
            for part in tree_leaves((record.args, record.kwargs)):
                if isinstance(part, Part):
                    uses.setdefault(part.root, set()).add(part)
    for part in tree_leaves(recording.result):
        if isinstance(part, Part):
            uses.setdefault(part.root, set()).add(part)
    for record in recording.calls:
        if isinstance(record, Call) and record.function._overloadpacket.__name__ in _ALLOCATIONS:
            own = roots[record.made[0]]
            taken = uses.get(own.root, set())
            if len(taken) == 1 and _fills(part := next(iter(taken)), own):
                roots[own.root] = part
    return roots


def _fills(part: Part, own: Part) -> bool:
    """Whether the part is all of a root, dense as that is."""
    whole = part.offset == 0 and part.dtype == own.dtype
    return whole and _dense(part) and _dense(own) and math.prod(part.size) == math.prod(own.size)


def _dense(part: Part) -> bool:
    return part.stride == torch.empty(part.size, device="meta").stride()


def _last_uses(recording: Recording) -> dict[int, list[int]]:
    """By call, the roots that nothing takes after it; of those that were made."""
    last = {}
    for i, record in enumerate(recording.calls):
        if isinstance(record, RangeRecord):
            continue
        values = record.values if isinstance(record, Launch) else (record.args, record.kwargs)
        for part in tree_leaves(values):
            if isinstance(part, Part):
                last[part.root] = i
        if isinstance(record, Call):
            last |= {root: i for root in record.made if root is not None}
    for part in tree_leaves(recording.result):
        if isinstance(part, Part):
            last.pop(part.root, None)
    found: dict[int, list[int]] = {}
    for root, i in last.items():
        found.setdefault(i, []).append(root)
    return found
