# SPDX-License-Identifier: Apache-2.0
"""Count what a call costs, without timing: launches, host syncs, bytes, FLOP, saved bytes.

The counts are those of the GPU path. On a CPU they come from the torch backend, or from the Triton
backend under its interpreter, which make the same calls as on a GPU.

A launch is one Triton kernel, or one aten call that is neither a view nor an allocation. Casts and
fills count; launches by a library inside one call do not. Bytes are those of all tensors that a
launch reads and returns. A tensor updated in place thus counts twice for aten. It counts once for a
Triton kernel, whose arguments do not say what it writes. FLOP use torch's formulas for aten calls
and ``costs.py`` for Triton kernels.
"""

import contextlib
import dataclasses
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from samfast.kernels._common.implementation import IMPLEMENTATIONS
from samfast.kernels._common.launched import flops_of, tensor_bytes

_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_FREE = (*_ALLOCATIONS, "_unsafe_view", "detach", "lift_fresh", "alias", "set_", "sym_size")
# CUDA kernels in one call, if more than one.
_NATIVE_LAUNCHES = {"conv_experts_backward": 2, "hypercomplex_contract": 2}
_SYNCS = (
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_dim",
    "_unique2",
)


Run: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclasses.dataclass
class Counts:
    """Launches and syncs by name, total bytes and flops, and the largest new tensor in bytes."""

    launches: Counter[str] = dataclasses.field(default_factory=Counter)
    syncs: Counter[str] = dataclasses.field(default_factory=Counter)
    bytes: int = 0
    flops: int = 0
    largest: int = 0
    inside: list[str] = dataclasses.field(default_factory=list, repr=False)  # open now

    def launch(self, name: str, times: int, size: int, flops: int) -> None:
        """Count one call. name: with its namespace, if it has one   size: bytes moved"""
        self.launches[name.rpartition("::")[2]] += times
        self.bytes += size
        self.flops += flops

    def sync(self, name: str) -> None:
        """Count one wait of the host for the device."""
        self.syncs[name.rpartition("::")[2]] += 1

    @contextlib.contextmanager
    def opened(self, operator: str) -> Iterator[None]:
        """Attribute what is counted inside to this operator's body."""
        self.inside.append(operator)
        try:
            yield
        finally:
            self.inside.pop()

    @property
    def total_launches(self) -> int:
        """Number of launches of all operators."""
        return self.launches.total()

    @property
    def total_syncs(self) -> int:
        """Number of times the host waited for the device."""
        return self.syncs.total()


class _Counting(TorchDispatchMode):
    """Counts calls. closed: samfast's operators that count as one call

    run: see ``counting``
    """

    def __init__(self, counts: Counts, closed: Collection[str] = (), run: Run | None = None):
        super().__init__()
        self.counts, self.closed, self.run = counts, closed, run
        self.created: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # queries of a fake tensor, such as its device
            return func(*args, **kwargs)
        body = IMPLEMENTATIONS.get(func._schema.name)
        if body is not None and func._schema.name not in self.closed:
            out = NotImplemented if self.run is None else self.run(func, args, kwargs)
            if out is not NotImplemented:
                return out
            with self.counts.opened(func._schema.name), self:
                return body(*args, **kwargs)
        with self:  # an operator that only calls others, such as linear
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        space, _, name = func._schema.name.partition("::")
        # An operator that writes to its arguments may return nothing.
        native = space == "samfast_native" or (space == "aten" and not func._schema.returns)
        if _is_sync(func, name, tensors, made):
            self.counts.sync(name)
        if native or (not _is_view(func) and name not in _FREE and any(t.numel() for t in made)):
            size = sum(_nbytes(t) for t in (*tensors, *made))
            flops = _flops(func, name, args, kwargs, out)
            times = _NATIVE_LAUNCHES.get(name, 1)
            self.counts.launch(func._schema.name, times, size, flops)
        if not _is_view(func):
            self.counts.largest = max([self.counts.largest, *map(_nbytes, made)])
            self.created += [(StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes())
                             for t in made]  # fmt: skip
        return out


@contextlib.contextmanager
def counting(
    closed: Collection[str] = (), *, counts: Counts | None = None, run: Run | None = None
) -> Iterator[Counts]:
    """Count everything inside; yield the Counts. closed: names of operators that stay one call.

    counts: Counts to add to, such as a subclass that also records the caller
    run: called instead of the body of a samfast operator, with the operator, its arguments and
        keyword arguments. Returns the result, or NotImplemented to run and count the body.
    """
    counts = Counts() if counts is None else counts
    with _triton_launches(counts), _Counting(counts, closed, run):
        yield counts


def count(call: Callable[[], Any]) -> Counts:
    """Count one call, after an uncounted one (first calls import and cache)."""
    call()
    with counting() as counts:
        call()
    return counts


@dataclasses.dataclass(frozen=True)
class SavedBytes:
    """Bytes that autograd keeps after a forward, in two ways, without known tensors and results.

    hooks: storages passed to save_for_backward, each once
    living: storages that the forward made and that are still alive, without those of the result. A
        tensor kept on a context or module shows only here.
    """

    hooks: int
    living: int


def saved_bytes(
    call: Callable[[], Any], known: Iterable[Tensor], closed: Collection[str] = ()
) -> SavedBytes:
    """Count bytes kept for the backward of ``call()``. known: parameters and inputs to leave out.

    closed: as for ``counting``; tensors that such an operator keeps elsewhere are not seen
    Put x among the known tensors or not, as the question requires: it is alive either way.
    """
    own = {t.untyped_storage()._cdata for t in known}
    packed: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        packed[storage._cdata] = storage.nbytes()
        return t

    counts = Counts()
    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with keeping, _triton_launches(counts), _Counting(counts, closed) as mode:
        result = call()
    gc.collect()
    given = {t.untyped_storage()._cdata for t in tree_leaves(result) if isinstance(t, Tensor)}
    alive = {ref.cdata: size for ref, size in mode.created if not ref.expired()}
    hooks = sum(size for key, size in packed.items() if key not in own)
    living = sum(size for key, size in alive.items() if key not in own | given)
    return SavedBytes(hooks, living)


class Living(TorchDispatchMode):
    """Records which storages made inside were alive when, without known tensors.

    device: count only storages of this type, such as "cuda"; None: of all

    Enter it before ``counting``, which opens samfast's operators, so that it sees what their bodies
    make. It does not see what one aten call makes and drops inside itself.
    """

    def __init__(self, known: Iterable[Tensor], device: str | None = None):
        super().__init__()
        self.device = device
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # storage -> when it was made
        self.events: list[tuple[int, int]] = []  # (which, bytes), negative when it ends

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and self.device in (None, t.device.type):
                self._see(t.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.alive:
            return
        which = len(self.events)

        def ends(_: Any) -> None:
            del self.alive[key]
            self.events.append((which, -size))

        self.alive[key] = which, weakref.ref(storage, ends)
        self.events.append((which, size))

    def peak(self, but: Iterable[Tensor] = ()) -> int:
        """Return the most bytes alive at once, without the tensors ``but``."""
        keys = {t.untyped_storage()._cdata for t in but}
        hidden = {self.alive[key][0] for key in keys if key in self.alive}
        now = most = 0
        for which, size in self.events:
            now += 0 if which in hidden else size
            most = max(most, now)
        return most

    def worst(self, of: Iterable[Tensor] = ()) -> tuple[int, int]:
        """Return the most bytes alive at once, and how many of these belong to the tensors."""
        keys = {t.untyped_storage()._cdata for t in of}
        own = {self.alive[key][0] for key in keys if key in self.alive}
        now = of_own = 0
        most = 0, 0
        for which, size in self.events:
            now += size
            of_own += size if which in own else 0
            most = max(most, (now, of_own), key=lambda moment: moment[0])
        return most


def _nbytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _flops(func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Count FLOP by torch's formulas; an in-place product costs the same as the other."""
    packet = func._overloadpacket
    if packet not in flop_registry and name.endswith("_"):
        packet = getattr(torch.ops.aten, name[:-1], None)
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _is_view(func: Any) -> bool:
    """True if the result shares memory with an argument that is not written."""
    infos = [r.alias_info for r in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _is_sync(func: Any, name: str, tensors: list[Tensor], made: list[Tensor]) -> bool:
    if name in _SYNCS:
        return True
    if name in ("index", "index_put", "index_put_"):
        return any(t.dtype == torch.bool for t in tensors[1:])
    devices = {t.device.type for t in tensors}
    return name in ("_to_copy", "copy_") and "cuda" in devices and any(t.is_cpu for t in made)


@contextlib.contextmanager
def _triton_launches(counts: Counts) -> Iterator[None]:
    """Count Triton launches, compiled or interpreted, but not the interpreter's own calls."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    originals = {InterpretedFunction: InterpretedFunction.run, JITFunction: JITFunction.run}

    def note(kernel: Any, args: Any, named: dict[str, Any]) -> None:
        flops = flops_of(kernel, dict(zip(kernel.arg_names, args, strict=False)) | named)
        counts.launch(kernel.fn.__name__, 1, tensor_bytes([*args, *named.values()]), flops)

    def interpreted(self: Any, *args: Any, grid: Any, warmup: Any, **named: Any) -> Any:
        note(self, args, named)
        with _disable_current_modes():
            return originals[InterpretedFunction](self, *args, grid=grid, warmup=warmup, **named)

    def compiled(self: Any, *args: Any, grid: Any, warmup: Any, **named: Any) -> Any:
        note(self, args, named)
        return originals[JITFunction](self, *args, grid=grid, warmup=warmup, **named)

    InterpretedFunction.run, JITFunction.run = interpreted, compiled
    try:
        yield
    finally:
        for kind, run in originals.items():
            kind.run = run
