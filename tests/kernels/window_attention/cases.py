# SPDX-License-Identifier: Apache-2.0
"""Inputs for window_attention and the backends that run on this machine."""

import dataclasses

import torch
from draws import DEVICE, drawing

from samfast.functional import window_attention
from samfast.kernels._common.windows import Windows
from samfast.kernels.window_attention import example, reference

from ..operation import Operation, runnable_by

BACKENDS = ("torch", "cpu", "triton")
# Those that are fast enough for every case; the interpreter has cases of its own.
WHOLE = ("torch", "triton") if DEVICE.type == "cuda" else ("torch", "cpu")
runnable = runnable_by(example)


@dataclasses.dataclass(frozen=True)
class Case:
    """rank 0: the padding is the bias alone, None: it is zeros; turn: how its keys are rotated."""

    batch: int = 2
    heads: int = 2
    height: int = 20
    width: int = 17
    window: tuple[int, int] = (14, 14)
    head_dim: int = 16
    rank: int | None = 0
    turn: str = ""

    def __str__(self):
        name = f"{self.batch}x{self.height}x{self.width}-win{self.window[0]}x{self.window[1]}"
        name += f"-hd{self.head_dim}-pad{self.rank}"
        return name + (f"-{self.turn}" if self.turn else "")

    @property
    def names(self):
        pads = () if self.rank is None else ("dpad_bias", "dpad_h", "dpad_b")
        return ("out", "dqkv", *pads[: 3 if self.rank else 1])

    @property
    def windows(self):
        return Windows(self.batch, self.height, self.width, *self.window)

    def tensors(self, dtype, small=None):
        """qkv and what makes the padding as leaves that want gradients, and dout."""
        draw, small = drawing(6, dtype), small or dtype
        width = self.heads * self.head_dim
        size = (self.batch, self.height, self.width)
        leaves = [draw(*size, 3 * width)]
        if self.rank is not None:
            leaves.append(draw(3 * width, dtype=small))
        if self.rank:
            leaves.append(draw(self.batch * self.windows.pads, self.rank))
            leaves.append(draw(3 * width, self.rank, dtype=small))
        return [t.requires_grad_() for t in leaves], draw(*size, width)

    def turns(self):
        """cos and sin of the padding's rows, or two of None."""
        if not self.turn:
            return None, None
        angles = drawing(7)(self.windows.pads, self.head_dim // 2).float() * 3
        return angles.cos(), angles.sin()

    def call(self, leaves, backend):
        qkv, *pads = leaves
        named = dict(zip(("pad_bias", "pad_h", "pad_b"), pads, strict=False))
        if not self.turn:
            return window_attention(qkv, self.heads, self.window, **named, backend=backend)
        sources = [named.get(name) for name in ("pad_bias", "pad_h", "pad_b")]
        parts, halves = qkv.unflatten(3, (3, self.heads, -1)), self.turn == "halves"
        scale, turns = self.head_dim**-0.5, self.turns()
        if backend == "reference":
            rows = reference.padding_rows(*sources, turns, halves, self.windows, parts)
            return reference.window_attention(parts, rows, self.windows, scale).flatten(3)
        out = torch.ops.samfast.window_attention(
            parts, *sources, *turns, halves, list(self.windows), scale, backend
        )
        return out.flatten(3)

    def run(self, dtype, backend, small=None):
        leaves, dout = self.tensors(dtype, small)
        out = self.call(leaves, backend)
        grads = torch.autograd.grad(out, leaves, dout, materialize_grads=True)
        return [out.detach(), *grads]


SMALL = Case(batch=1, heads=1, height=3, width=2, window=(2, 2), rank=2)
TURNED = dataclasses.replace(SMALL, turn="interleaved")
MAP = dataclasses.replace(SMALL, window=(3, 2), rank=None)


def operation(case, way):
    def kept(tensors, wanted):
        """qkv and the result, and one number a query and head."""
        queries = case.batch * case.heads * case.height * case.width
        return tensors[0].nbytes * 4 // 3, max(4, tensors[0].itemsize) * queries

    return Operation(
        "window_attention",
        way,
        lambda dtype: case.tensors(dtype)[0],
        lambda tensors, backend: [case.call(tensors, backend)],
        runnable,
        BACKENDS,
        kept,
        1,
        apart=((1,), (2,), (3,), (1, 2, 3)),  # that of qkv is always made
        autocast="result",
    )


def finite(case, way):
    return dataclasses.replace(operation(dataclasses.replace(case, heads=1), way), apart=None)


OPERATIONS = [operation(dataclasses.replace(SMALL, heads=2), "")]
FINITE = [finite(case, way) for way, case in {"": SMALL, "turned": TURNED, "map": MAP}.items()]
