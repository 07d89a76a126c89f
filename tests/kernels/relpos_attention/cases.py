# SPDX-License-Identifier: Apache-2.0
"""Inputs for the two attention operations and the backends that run on this machine."""

import dataclasses

import torch
from draws import DEVICE, drawing

from samfast.functional import relpos_attention, window_relpos_attention
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import example

from ..operation import Operation, runnable_by

BACKENDS = ("torch", "cpu", "triton")
# Those that are fast enough for every case; the interpreter has cases of its own.
WHOLE = ("torch", "triton") if DEVICE.type == "cuda" else ("torch", "cpu")
runnable = runnable_by(example)


@dataclasses.dataclass(frozen=True)
class MapCase:
    """relpos_attention on one map; tables: their lengths where they are to be interpolated."""

    batch: int = 2
    heads: int = 2
    height: int = 9
    width: int = 13
    head_dim: int = 16
    tables: tuple[int, int] | None = None

    names = ("out", "dq", "dk", "dv", "drel_pos_h", "drel_pos_w")

    @property
    def id(self):
        name = f"{self.batch}x{self.heads}x{self.height}x{self.width}-hd{self.head_dim}"
        return name + ("-interpolated" if self.tables else "")

    def tensors(self, dtype, table_dtype=None):
        """q, k, v and the tables as leaves that want gradients, and dout."""
        draw, small = drawing(5, dtype), table_dtype or dtype
        shape = (self.batch, self.heads, self.height, self.width, self.head_dim)
        lengths = self.tables or (2 * self.height - 1, 2 * self.width - 1)
        leaves = [draw(*shape) for _ in range(3)]
        leaves += [draw(length, self.head_dim, divisor=2, dtype=small) for length in lengths]
        return [t.requires_grad_() for t in leaves], draw(*shape)

    def call(self, leaves, backend):
        return relpos_attention(*leaves, backend=backend)

    def run(self, dtype, backend, table_dtype=None):
        leaves, dout = self.tensors(dtype, table_dtype)
        out = self.call(leaves, backend)
        return [out, *torch.autograd.grad(out, leaves, dout, materialize_grads=True)]


@dataclasses.dataclass(frozen=True)
class WindowCase:
    """window_relpos_attention; rank 0: the padding is the bias alone, None: it is zeros."""

    batch: int = 2
    heads: int = 2
    height: int = 20
    width: int = 17
    window: tuple[int, int] = (14, 14)
    head_dim: int = 16
    rank: int | None = 0

    @property
    def id(self):
        name = f"{self.batch}x{self.height}x{self.width}-win{self.window[0]}x{self.window[1]}"
        return f"{name}-hd{self.head_dim}-pad{self.rank}"

    @property
    def names(self):
        pads = () if self.rank is None else ("dpad_bias", "dpad_h", "dpad_b")
        return ("out", "dqkv", "drel_pos_h", "drel_pos_w", *pads[: 3 if self.rank else 1])

    @property
    def windows(self):
        return Windows(self.batch, self.height, self.width, *self.window)

    def tensors(self, dtype, table_dtype=None):
        """qkv, the tables and what makes the padding as leaves that want gradients, and dout."""
        draw, small = drawing(6, dtype), table_dtype or dtype
        width = self.heads * self.head_dim
        size = (self.batch, self.height, self.width)
        leaves = [draw(*size, 3 * width)]
        for side in self.window:
            leaves.append(draw(2 * side - 1, self.head_dim, divisor=2, dtype=small))
        if self.rank is not None:
            leaves.append(draw(3 * width, dtype=small))
        if self.rank:
            rows = self.batch * self.windows.pads
            leaves.append(draw(rows, self.rank))
            leaves.append(draw(3 * width, self.rank, dtype=small))
        return [t.requires_grad_() for t in leaves], draw(*size, width)

    def call(self, leaves, backend):
        qkv, table_h, table_w, *pads = leaves
        named = dict(zip(("pad_bias", "pad_h", "pad_b"), pads, strict=False))
        return window_relpos_attention(
            qkv, self.heads, self.window, table_h, table_w, **named, backend=backend
        )

    run = MapCase.run


def operation(case, name, activations, **options):
    def kept(tensors, wanted):
        """The tensors and the result, and one number a query and head."""
        given = sum(t.nbytes for t in tensors[:activations])
        queries = case.batch * case.heads * case.height * case.width
        return given * 4 // 3, max(4, tensors[0].itemsize) * queries

    return Operation(
        name,
        "",
        lambda dtype: case.tensors(dtype)[0],
        lambda tensors, backend: [case.call(tensors, backend)],
        runnable,
        BACKENDS,
        kept,
        activations,
        autocast="result",
        **options,
    )


MAP = MapCase(batch=1, heads=1, height=2, width=3)
WINDOWS = WindowCase(batch=1, heads=1, height=3, width=2, window=(2, 2), rank=2)


def operations(heads):
    apart = (3, 4), ((1, 2), (3,), (4,), (5,), (3, 4, 5))  # those of q, k and v are always made
    of_map, windows = (dataclasses.replace(case, heads=heads) for case in (MAP, WINDOWS))
    return [
        operation(of_map, "relpos_attention", 3, apart=apart[:1]),
        operation(windows, "window_relpos_attention", 1, apart=apart[1]),
    ]


OPERATIONS, FINITE = operations(heads=2), operations(heads=1)
