# SPDX-License-Identifier: Apache-2.0
"""y = x Wᵀ + b + s · f(x Aᵀ) Bᵀ and its gradients, around the library's GEMM.

A path (torch_path, cpu_path, triton_kernels) has the four rank-r stages; a middle map has f.
Frozen weights of another dtype are cast to x's dtype for the GEMM. The cast is never kept.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common.middle import find

MAX_CHUNKS = 32  # partial sums over rows that a weight gradient is added up from
MAX_PARTIALS = 2**26  # bytes of dz's partials at a time; a chunk of rows may take more


def chunks_at_a_time(chunks: int, of_one: int) -> int:
    """Chunks of rows whose partials of dz are there together; of_one: bytes of one chunk's."""
    return min(chunks, max(1, MAX_PARTIALS // max(1, of_one)))


class Sums:
    """Gradients of weights whose partial sums over chunks of rows wait to be added up.

    A launch that adds up something else also adds up some of these. A gradient has its values only
    after that, or after ``finish``. A path that adds up at once leaves this empty.
    """

    def __init__(self):
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._add_up: Callable[[Sums], None] | None = None

    def add(self, partials: Tensor, grad: Tensor, add_up: "Callable[[Sums], None]") -> None:
        """partials (chunks, *grad.shape); add_up: adds up what it takes from this."""
        self._waiting.append((partials, grad))
        self._add_up = add_up

    def take(self, most: int) -> list[tuple[Tensor, Tensor]]:
        """The first that came, so many at most; they wait no longer."""
        taken, self._waiting = self._waiting[:most], self._waiting[most:]
        return taken

    @property
    def waiting(self) -> bool:
        """Whether any wait."""
        return bool(self._waiting)

    def finish(self) -> None:
        """Add up all that still wait."""
        while self._waiting:
            self._add_up(self)


class Slices:
    """Which columns of y get an update: triples (columns, rows of lora_b, columns of z).

    starts: first columns, empty for all of y; every slice is as long as its share of lora_b.
    own: every slice has its own r columns of z; otherwise all share one z.
    """

    def __init__(self, starts, lora_b, own):
        self.starts = tuple(starts) or (0,)
        self.length, self.rank = lora_b.shape[0] // len(self.starts), lora_b.shape[1]
        self.own = own and len(self.starts) > 1
        self.width = self.rank * len(self.starts) if self.own else self.rank

    def __iter__(self):
        for i, start in enumerate(self.starts):
            first = i * self.rank if self.own else 0
            yield (
                slice(start, start + self.length),
                slice(i * self.length, (i + 1) * self.length),
                slice(first, first + self.rank),
            )


def low(path, rows, lora_a, params, seed, options, h=None):
    """z of rows (tokens, D), and the middle map's aux, z_pad and saved.

    h: drop(x) Aᵀ where the producer of x has made it
    """
    _, dropout, middle, geometry, _, _ = options
    h = path.down(rows, lora_a, dropout, seed) if h is None else h
    z, aux, z_pad, saved = find(middle).forward(h, geometry, *params)
    return _as_rows(z, rows.dtype), aux, z_pad, saved


def forward(path, x, weight, bias, lora_a, lora_b, params, seed, options, h=None):
    """Returns y, z, and the middle map's aux, z_pad and saved; h as in ``low``."""
    scaling, _, _, _, starts, own = options
    rows = _flat(x)
    z, aux, z_pad, saved = low(path, rows, lora_a, params, seed, options, h)
    y = F.linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    path.up_(y, z, lora_b, scaling, Slices(starts, lora_b, own))
    return y.view(*x.shape[:-1], y.shape[-1]), z, aux, z_pad, saved


def backward(
    path, dy, daux, dz_pad, x, weight, lora_a, lora_b, z, saved, params, seed, options, needs,
    bias_dtype,
):  # fmt: skip
    """Gradients of (x, weight, bias, lora_a, lora_b, *params), None where not needed."""
    dropout = options[1]
    need_x, need_weight, need_bias, need_a, need_b, *need_params = needs
    shape, dtype = dy.shape, dy.dtype
    dy = _flat(dy)
    rows = None if x is None else _flat(x)
    need_h = need_x or need_a

    dx = torch.mm(dy, weight.to(dtype)) if need_x else None
    dweight = torch.mm(dy.t(), rows).to(weight.dtype) if need_weight else None
    dbias = dy.sum(0, dtype=torch.promote_types(dtype, bias_dtype)) if need_bias else None
    needs_map = (need_h, need_b, *need_params)
    dh, db, dparams = up(path, dy, daux, dz_pad, lora_b, z, saved, params, options, needs_map)
    da = None
    if need_h:
        da = path.down_backward_(dx, dh, rows if need_a else None, lora_a, dropout, seed)
    if dx is not None:
        dx = dx.view(*shape[:-1], dx.shape[-1])
    return [dx, dweight, None if dbias is None else dbias.to(bias_dtype), da, db, *dparams]


def up(
    path, dy, daux, dz_pad, lora_b, z, saved, params, options, needs, made=None, sums=None
):  # fmt: skip
    """From dy (tokens, O) back to h: dh, dB and the gradients of params, None where not needed.

    needs: whether gradients are wanted of (h, lora_b, *params)
    made: dz and dB, where the producer of dy has made them   sums: where dB may wait
    """
    scaling, _, middle, geometry, starts, own = options
    need_h, need_b, *need_params = needs
    if not any(needs):
        return None, None, [None] * len(params)
    slices = Slices(starts, lora_b, own)
    z = z if need_b else None
    dz, db = made or path.up_backward(dy, z, lora_b, scaling, slices, sums)
    dh, dparams = find(middle).backward(
        dz, daux, dz_pad, saved, params, geometry, (need_h, *need_params)
    )
    return _as_rows(dh, dy.dtype) if need_h else None, db, dparams


def _flat(t):
    """(tokens, features); the number of rows is spelt out for tensors without elements."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _as_rows(t, dtype):
    """What a map returned, as the stages take it: of x's dtype and contiguous."""
    return t.to(dtype).contiguous()
