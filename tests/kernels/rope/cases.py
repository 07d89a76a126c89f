# SPDX-License-Identifier: Apache-2.0
"""Calls of rope that the tests share."""

import dataclasses

import torch
from draws import drawing

from samfast.functional import rope
from samfast.kernels._common.windows import Windows
from samfast.kernels.rope import example

from ..operation import Operation, runnable_by

BACKENDS = ("torch", "cpu", "triton")
NAMES = ("out", "dqkv")
runnable = runnable_by(example)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; the default is two windows of which the second of each line is cut."""

    batch: int = 2
    height: int = 3
    width: int = 5
    heads: int = 2
    head_dim: int = 8
    window: tuple[int, int] | None = (2, 3)
    pairs: str = "interleaved"
    parts: int = 2

    @property
    def id(self):
        window = "whole" if self.window is None else "win{}x{}".format(*self.window)
        shape = f"{self.batch}x{self.height}x{self.width}x{self.heads}"
        return f"{shape}-hd{self.head_dim}-{window}-{self.pairs}-of{self.parts}"

    @property
    def windows(self):
        sides = self.window or (self.height, self.width)
        return Windows(self.batch, self.height, self.width, *sides)

    @property
    def halves(self):
        return self.pairs == "halves"

    def tables(self, dtype=torch.float32):
        """cos and sin for tensors of this dtype: those of float64 are the same numbers."""
        height, width = self.windows[3:]
        rows = drawing(4)(height * width, self.head_dim // 2).float()  # any angles
        return [t.to(torch.promote_types(dtype, torch.float32)) for t in (rows.cos(), rows.sin())]

    def tensors(self, dtype):
        """qkv, and the gradient that comes in."""
        draw = drawing(3, dtype)
        shape = self.batch, self.height, self.width, 3 * self.heads * self.head_dim
        return draw(*shape), draw(*shape)

    def call(self, qkv, backend, tables=None):
        tables = tables or self.tables(qkv.dtype)
        named = dict(heads=self.heads, window=self.window, pairs=self.pairs, parts=self.parts)
        return rope(qkv, *tables, **named, backend=backend)

    def run(self, dtype, backend):
        """out, and the gradient of qkv."""
        qkv, dout = self.tensors(dtype)
        out = self.call(qkv.requires_grad_(), backend)
        return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def operation(case, way):
    tables = {dtype: case.tables(dtype) for dtype in (torch.float32, torch.float64)}

    def call(tensors, backend):
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        return [case.call(tensors[0], backend, tables[wide])]

    return Operation(
        "rope",
        way,
        lambda dtype: [case.tensors(dtype)[0]],
        call,
        runnable,
        BACKENDS,
        kept=lambda tensors, wanted: (sum(t.nbytes for t in tables[torch.float32]), 0),
    )


def operations(heads):
    small = Case(1, 3, 3, heads, 4, (2, 2))
    halves = dataclasses.replace(small, window=None, pairs="halves", parts=1)
    return [operation(small, ""), operation(halves, "halves")]


OPERATIONS, FINITE = operations(heads=2), operations(heads=1)
