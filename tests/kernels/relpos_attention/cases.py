# SPDX-License-Identifier: Apache-2.0
"""Inputs for the two attention operations and the backends that run on this machine."""

import dataclasses

import torch

from samfast import backends
from samfast.functional import relpos_attention, window_relpos_attention
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention.op import supports

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "cpu", "triton")
# Those that are fast enough for every case; the interpreter has cases of its own.
WHOLE = ("torch", "triton") if DEVICE.type == "cuda" else ("torch", "cpu")


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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
        generator = torch.Generator().manual_seed(5)
        shape = (self.batch, self.heads, self.height, self.width, self.head_dim)
        lengths = self.tables or (2 * self.height - 1, 2 * self.width - 1)
        leaves = [draw(generator, *shape).to(DEVICE, dtype) for _ in range(3)]
        leaves += [
            (0.5 * draw(generator, length, self.head_dim)).to(DEVICE, table_dtype or dtype)
            for length in lengths
        ]
        dout = draw(generator, *shape).to(DEVICE, dtype)
        return [t.requires_grad_() for t in leaves], dout

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
        generator = torch.Generator().manual_seed(6)
        width = self.heads * self.head_dim
        size = (self.batch, self.height, self.width)
        small = table_dtype or dtype
        leaves = [draw(generator, *size, 3 * width).to(DEVICE, dtype)]
        for side in self.window:
            leaves.append((0.5 * draw(generator, 2 * side - 1, self.head_dim)).to(DEVICE, small))
        if self.rank is not None:
            leaves.append(draw(generator, 3 * width).to(DEVICE, small))
        if self.rank:
            rows = self.batch * self.windows.pads
            leaves.append(draw(generator, rows, self.rank).to(DEVICE, dtype))
            leaves.append(draw(generator, 3 * width, self.rank).to(DEVICE, small))
        dout = draw(generator, *size, width).to(DEVICE, dtype)
        return [t.requires_grad_() for t in leaves], dout

    def call(self, leaves, backend):
        qkv, table_h, table_w, *pads = leaves
        named = dict(zip(("pad_bias", "pad_h", "pad_b"), pads, strict=False))
        return window_relpos_attention(
            qkv, self.heads, self.window, table_h, table_w, **named, backend=backend
        )

    run = MapCase.run


def runnable(backend: str, head_dim: int = 16) -> str | None:
    """None when the backend runs on this machine's test device, else the sentence why not."""
    if backend == "triton" and (missing := backends.triton_missing(DEVICE)) is not None:
        return missing
    q = torch.empty(1, 2, 2, 1, head_dim, device=DEVICE)
    return supports(backend, q, Windows.whole(1, 2, 2))
