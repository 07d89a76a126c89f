# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter without its mercy.

The interpreter reads zeros where a masked load has no ``other``, checks no bounds, runs programs
one after another in order, wraps int32 silently and hands out clean memory from ``torch.empty``. A
GPU does none of that. Inside ``guarded()`` every interpreted launch

- may load and store only elements of the tensors passed to it, in its own element type;
- gets NaN (or the most negative integer) on masked-off lanes without ``other``;
- fails when two lanes of one store, or two programs, touch an address that one of them writes;
- runs its programs in the order asked for;
- fails when int32 arithmetic overflows, and when it uses an atomic;

and ``torch.empty`` and its relatives are filled with NaN. Works with Triton 3.6 to 3.9.
"""

import contextlib
import dataclasses

import numpy as np
import torch
from triton.runtime import interpreter

ORDERS = ("forward", "reverse", "shuffled")
_NOBODY, _MANY = -1, -2


class GuardError(AssertionError):
    """A kernel did what a GPU would punish."""


class Region:
    """The elements of one tensor as addresses, and which program read or wrote each last."""

    def __init__(self, tensor: torch.Tensor):
        self.base, self.itemsize = tensor.data_ptr(), tensor.element_size()
        pairs = zip(tensor.stride(), tensor.size(), strict=True)
        self.dims = sorted(((s, n) for s, n in pairs if n > 1 and s > 0), reverse=True)
        self.numel = int(np.prod([n for _, n in self.dims])) if tensor.numel() else 0
        self.last = sum(s * (n - 1) for s, n in self.dims)
        self.readers = np.full(self.numel, _NOBODY, dtype=np.int64)
        self.writers = np.full(self.numel, _NOBODY, dtype=np.int64)

    def met_by(self, addresses: np.ndarray) -> bool:
        """Whether the span of the addresses meets the tensor's, which costs little to say."""
        end = self.base + (self.last + 1) * self.itemsize
        return self.numel > 0 and addresses.min() < end and addresses.max() >= self.base

    def index(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """Position of every address among the elements, -1 where it is none of them."""
        offset = addresses.astype(np.int64) - self.base
        rest = offset // self.itemsize
        inside = (offset >= 0) & (rest <= self.last) & (offset % self.itemsize == 0)
        inside &= itemsize == self.itemsize and self.numel > 0
        position = np.zeros_like(rest)
        for stride, size in self.dims:
            step = np.minimum(rest // stride, size - 1)
            position, rest = position * size + step, rest - step * stride
        return np.where(inside & (rest == 0), position, -1)


@dataclasses.dataclass
class Guard:
    """State of one launch at a time; ``launches`` counts them."""

    order: str
    launches: int = 0
    regions: list = dataclasses.field(default_factory=list)
    program: int = 0
    sequence: np.ndarray | None = None

    def begin(self, tensors) -> None:
        self.launches += 1
        self.regions = [Region(t) for t in tensors]

    def visit(self, turn: int, grid) -> tuple[int, int, int]:
        """Which program runs in this turn."""
        total = int(np.prod(grid))
        if turn == 0:
            self.sequence = np.arange(total)
            if self.order == "reverse":
                self.sequence = self.sequence[::-1]
            elif self.order == "shuffled":
                self.sequence = np.random.default_rng(self.launches).permutation(total)
        self.program = int(self.sequence[turn])
        return np.unravel_index(self.program, grid)

    def locate(self, what, addresses, itemsize):
        """(region, positions) pairs that together hold all addresses, or GuardError."""
        found, missing = [], np.ones(addresses.shape, dtype=bool)
        for region in self.regions if addresses.size else ():
            if not region.met_by(addresses):
                continue
            position = region.index(addresses, itemsize)
            found.append((region, position[missing & (position >= 0)]))
            missing &= position < 0
        if missing.any():
            count, first = int(missing.sum()), hex(int(addresses[missing][0]))
            raise GuardError(
                f"{what} of {count} lanes outside the tensors of the launch, the first at {first}"
            )
        return found

    def load(self, addresses, itemsize) -> None:
        for region, at in self.locate("load", addresses, itemsize):
            self._conflict(region.writers[at], "a program reads what another one writes")
            before = region.readers[at]
            shared = (before != _NOBODY) & (before != self.program)
            region.readers[at] = np.where(shared, _MANY, self.program)

    def store(self, addresses, itemsize) -> None:
        if np.unique(addresses).size != addresses.size:
            raise GuardError("two lanes of one store write the same address")
        for region, at in self.locate("store", addresses, itemsize):
            self._conflict(region.writers[at], "two programs write the same address")
            self._conflict(region.readers[at], "a program writes what another one reads")
            region.writers[at] = self.program

    def _conflict(self, owners, sentence) -> None:
        if ((owners != _NOBODY) & (owners != self.program)).any():
            raise GuardError(sentence)


def _refuse_atomic(self, *args):
    raise GuardError("a kernel uses an atomic, whose order is not fixed")


def _check(self, condition, message):
    if not np.all(condition.data):
        raise GuardError(f"int32 overflow or failed assertion: {message}")


@contextlib.contextmanager
def guarded(order: str = "forward", poison: bool = True):
    """Every interpreted launch inside is checked; yields the Guard."""
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, known are {', '.join(ORDERS)}")
    guard = Guard(order)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    originals = {
        (builder, name): getattr(builder, name)
        for name in (
            "create_masked_load",
            "create_masked_store",
            "create_atomic_rmw",
            "create_atomic_cas",
            "create_assert",
            "set_grid_idx",
        )
    }
    originals |= {
        (executor, name): getattr(executor, name)
        for name in ("_init_args_hst", "_restore_args_dev")
    }
    masked_load = originals[builder, "create_masked_load"]
    masked_store = originals[builder, "create_masked_store"]
    init_args = originals[executor, "_init_args_hst"]
    turn = [0]

    def load(self, ptrs, mask, other, *rest):
        kind = interpreter._get_np_dtype(ptrs.get_element_ty())
        active = np.broadcast_to(mask.data, ptrs.data.shape)
        guard.load(ptrs.data[active], np.dtype(kind).itemsize)
        if other is None:
            worst = _worst(ptrs.data.shape, kind, ptrs.get_element_ty())
            other = interpreter.TensorHandle(worst, ptrs.get_element_ty())
        return masked_load(self, ptrs, mask, other, *rest)

    def store(self, ptrs, value, mask, *rest):
        active = np.broadcast_to(mask.data, ptrs.data.shape)
        kind = interpreter._get_np_dtype(ptrs.get_element_ty())
        guard.store(ptrs.data[active], np.dtype(kind).itemsize)
        return masked_store(self, ptrs, value, mask, *rest)

    def set_grid_idx(self, x, y, z):
        turn[0] = 0 if (x, y, z) == (0, 0, 0) else turn[0] + 1
        self.grid_idx = tuple(int(i) for i in guard.visit(turn[0], self.grid_dim))

    def init_args_hst(self, args_dev, kwargs):
        args, named = init_args(self, args_dev, kwargs)
        everything = [*args, *named.values()]
        guard.begin([t for t in everything if isinstance(t, torch.Tensor)])
        return args, named

    replacements = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": _refuse_atomic,
        "create_atomic_cas": _refuse_atomic,
        "create_assert": _check,
        "set_grid_idx": set_grid_idx,
        "_init_args_hst": init_args_hst,
        # CPU tensors are their own host copies; writing them back would touch virtual memory.
        "_restore_args_dev": lambda self, *args: None,
    }
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(
            tensor, scope
        )  # Triton 3.6 cannot turn an array into an index beside NumPy 2.4
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    options = interpreter.interpreter_builder.options
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        for owner, name in originals:
            setattr(owner, name, replacements[name])
        interpreter._patch_lang_tensor = patch_lang_tensor
        interpreter.interpreter_builder.options = dataclasses.replace(options, debug=True)
        torch.use_deterministic_algorithms(poison or deterministic)  # fills empty memory with NaN
        yield guard
    finally:
        torch.use_deterministic_algorithms(deterministic)
        interpreter.interpreter_builder.options = options
        interpreter._patch_lang_tensor = patch_tensor
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


def _worst(shape, kind, element_type):
    """What a masked-off lane may hold: NaN, or the most negative integer."""
    kind = np.dtype(kind)
    if element_type.is_bf16():
        return np.full(shape, 0x7FC0, dtype=kind)
    if kind.kind == "f":
        return np.full(shape, np.nan, dtype=kind)
    if kind.kind == "b":
        return np.ones(shape, dtype=kind)
    return np.full(shape, np.iinfo(kind).min or np.iinfo(kind).max, dtype=kind)
