# SPDX-License-Identifier: Apache-2.0
"""The calls that the body of an operator makes: aten and Triton, on which parts of which tensors.

A tensor is identified by its storage: the root, which is an input or a call's result, and its place
in it. Views are therefore not calls. What cannot be identified is refused with a sentence.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from samfast.kernels._common import ranges
from samfast.kernels._common.implementation import IMPLEMENTATIONS

_PLAIN = (
    bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format
)  # fmt: skip
_DEPENDS_ON_DATA = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_OF_DTYPES = ("promote_types", "result_type", "can_cast")  # which read no values
# Which also return numbers that follow from shapes.
_OF_SHAPES = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention")
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a tensor lies: bytes after its root's first element, and how from there."""

    root: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass
class Call:
    """One call of aten. made: the roots of its results, in order, None for what is no new one"""

    function: Callable
    args: tuple
    kwargs: dict
    made: list[int | None]


@dataclasses.dataclass
class Launch:
    """One launch of Triton. values: all arguments of the kernel by name, compile-time ones too

    compiled: what Triton compiled for it, None where it is interpreted
    """

    kernel: Any
    grid: tuple[int, ...]
    values: dict
    options: dict
    compiled: Any


@dataclasses.dataclass
class Range:
    """A profiler's range begins, or ends where ``label`` is None."""

    label: str | None


class Recording:
    """What was called with some inputs, each of which is a root, and what came of it.

    roots: Part of each root as it was made   devices: theirs
    problem: why this cannot be called again, or None
    """

    def __init__(self):
        self.calls: list[Call | Launch | Range] = []
        self.roots: list[Part] = []
        self.devices: list[torch.device | None] = []
        self.inputs = 0
        self.result: Any = None
        self.problem: str | None = None
        self._by_storage: dict[int, list[tuple[int, StorageWeakRef, int, int]]] = {}

    def refuse(self, sentence: str) -> None:
        self.problem = self.problem or sentence

    def add_root(self, t: Tensor) -> int:
        root, storage, start = len(self.roots), t.untyped_storage(), t.data_ptr()
        self.roots.append(Part(root, 0, tuple(t.shape), tuple(t.stride()), t.dtype))
        self.devices.append(t.device)
        known = self._by_storage.setdefault(storage._cdata, [])
        known[:] = [entry for entry in known if not entry[1].expired()]
        known.append((root, StorageWeakRef(storage), start, start + _span(t)))
        return root

    def knows(self, t: Tensor) -> bool:
        known = self._by_storage.get(t.untyped_storage()._cdata, ())
        return any(not entry[1].expired() for entry in known)

    def part(self, t: Tensor) -> Part | None:
        """Where t lies; refuses if that cannot be identified."""
        if t.is_neg() or t.is_conj():
            self.refuse("it takes a tensor with a lazy sign")
            return None
        at = t.data_ptr()
        known = self._by_storage.get(t.untyped_storage()._cdata, ())
        known = [entry for entry in known if not entry[1].expired()]
        if len(known) > 1 and t.numel():  # several inputs of one storage
            known = [k for k in known if k[2] <= at and at + _span(t) <= k[3]]
        if len(known) != 1:
            what = "a tensor from elsewhere" if not known else "inputs that overlap"
            self.refuse(f"it takes {what}")
            return None
        root, _, start, _ = known[0]
        return Part(
            root, at - start if t.numel() else 0, tuple(t.shape), tuple(t.stride()), t.dtype
        )

    def parts(self, values: Any) -> Any:
        """Values with a Part in place of each tensor."""
        return tree_map(lambda v: self.part(v) if isinstance(v, Tensor) else v, values)


def record(body: Callable, inputs: Sequence[Tensor | None], *args) -> tuple[Any, Recording]:
    """Call ``body(*args)``; returns its result, and what it called.

    inputs: the tensors among the args, in an order of the caller's. Only what aten shows is seen:
        a body must not read values by numpy(), or ask whether an input wants a gradient
    """
    recording = Recording()
    seen: dict[int, int] = {}
    for i, t in enumerate(inputs):
        if t is None or seen.setdefault(id(t), i) != i:  # the second time it is the first one
            recording.roots.append(Part(len(recording.roots), 0, (), (), torch.float32))
            recording.devices.append(None)
        else:
            recording.add_root(t)
    recording.inputs = len(inputs)
    with _lock, _launches(recording), ranges.listening(_ranges(recording)), _Mode(recording):
        result = body(*args)
    recording.result = recording.parts(result)
    return result, recording


def _span(t: Tensor) -> int:
    """Bytes from t's first element to the end of its last."""
    last = sum(max(n - 1, 0) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() if t.numel() else 0


class _Mode(TorchDispatchMode):
    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        body = IMPLEMENTATIONS.get(func._schema.name)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if func.namespace == "prim" or func._overloadpacket.__name__ in _OF_DTYPES:
            return func(*args, **kwargs)
        recording = self.recording
        inputs = recording.parts((args, kwargs)) if recording.problem is None else None
        out = func(*args, **kwargs)
        if recording.problem is None:
            self._note(func, inputs, out)
        return out

    def _note(self, func, inputs, out) -> None:
        recording, leaves = self.recording, tree_leaves(out)
        known = func._overloadpacket.__name__ in _OF_SHAPES
        numbers = any(not isinstance(t, (Tensor, type(None))) for t in leaves) and not known
        if numbers or any(tag in func.tags for tag in _DEPENDS_ON_DATA):
            return recording.refuse(f"{func} reads values on the host")
        leaves = [t if isinstance(t, Tensor) else None for t in leaves]
        for value in tree_leaves(inputs):
            if not isinstance(value, (Part, *_PLAIN)):
                return recording.refuse(f"{func} takes a {type(value).__name__}")
        infos = [argument.alias_info for argument in func._schema.arguments]
        written = any(info is not None and info.is_write for info in infos)
        made = [None if t is None or recording.knows(t) else recording.add_root(t) for t in leaves]
        if written or not leaves or any(root is not None for root in made):
            recording.calls.append(Call(func, *inputs, made))
        return None


@contextlib.contextmanager
def _launches(recording: Recording):
    """Inside this context, note what this thread launches."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    originals = {kind: kind.run for kind in (InterpretedFunction, JITFunction)}
    thread = threading.get_ident()

    def run(kernel, *args, grid, warmup, **named):
        compiled = isinstance(kernel, JITFunction)
        original = originals[JITFunction if compiled else InterpretedFunction]
        if threading.get_ident() != thread:
            return original(kernel, *args, grid=grid, warmup=warmup, **named)
        with _disable_current_modes():  # an interpreted kernel calls torch
            made = original(kernel, *args, grid=grid, warmup=warmup, **named)
        if recording.problem is None:
            if compiled and made is None:
                recording.refuse("a hook of Triton's left a launch out")
            else:
                made_of = made if compiled else None
                _note_launch(recording, kernel, args, grid, named, made_of)
        return made

    for kind in originals:
        kind.run = run
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.run = original


def _note_launch(recording: Recording, kernel, args, grid, named, compiled) -> None:
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False))
    values |= {name: value for name, value in named.items() if name in names}
    if len(values) != len(names):
        return recording.refuse(f"{kernel.__name__} is called with less than all of its arguments")
    values = {name: recording.parts(values[name]) for name in names}
    options = {name: value for name, value in named.items() if name not in names}
    recording.calls.append(Launch(kernel, tuple(grid), values, options, compiled))
    return None


def _ranges(recording: Recording):
    @contextlib.contextmanager
    def listener(label):
        recording.calls.append(Range(label))
        try:
            yield
        finally:
            recording.calls.append(Range(None))

    return listener
