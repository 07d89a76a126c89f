# SPDX-License-Identifier: Apache-2.0
"""The element-wise stages of the block as Triton launches; see torch_path for what each computes.

One launch a stage. Adapters up to MAX_RANK ride along: h = rows Aᵀ, in the backward dh A, and
beside GELU the gradient of A. Narrow ones of the layer before go back to z there too. A second
launch adds up partials.
Derivations, bytes and launches are in this folder's README.
"""

import contextlib
from pathlib import Path

import torch
import triton
from torch import Tensor

from samfast.kernels._common.tiles import tile
from samfast.kernels.lora_linear.engine import Sums
from samfast.kernels.lora_linear.triton_kernels import add_up, chunk_rows, precision
from samfast.kernels.sam_block import costs, torch_path
from samfast.kernels.sam_block.torch_path import Low, Up
from samfast.kernels.sam_block.triton_gelu import gelu_backward_kernel, gelu_kernel
from samfast.kernels.sam_block.triton_norm import norm_backward_kernel, norm_kernel

TILES = Path(__file__).with_name("tiles.json")
FEW = 8  # columns of dh that multiply-adds take
MAX_RANK = {2: 128, 4: 32}  # by bytes per element of the rows

# One launch of the library each, and all that a pass over the rows can do.
add, norm_parameters = torch_path.add, torch_path.norm_parameters


def norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, lora_a=None
) -> tuple[Tensor, Tensor | None]:
    return _norm(x, None, None, weight, bias, eps, dtype, lora_a)


def add_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
    lora_a=None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, update.dtype))
    return total, *_norm(x, _rows(update), total, weight, bias, eps, dtype, lora_a)


def _norm(x, update, total, weight, bias, eps, dtype, lora_a):
    x, lora_a = _rows(x), _factor(lora_a, dtype)
    tokens, columns = x.shape
    n = x.new_empty(tokens, columns, dtype=dtype)
    h = None if lora_a is None else n.new_empty(tokens, lora_a.shape[0])
    if tokens == 0:
        return n, h
    block = _tile("norm" if h is None else "norm_down", lora_a, n)
    with _on(x):
        norm_kernel[(triton.cdiv(tokens, block["BLOCK_M"]),)](
            x, update, weight.contiguous(), bias.contiguous(), lora_a, total, n, h, tokens,
            columns, 0 if h is None else h.shape[1], x.stride(0),
            0 if update is None else update.stride(0), eps, ADD=update is not None,
            DOWN=h is not None, PRECISION=precision(dtype), **block,
        )  # fmt: skip
    return n, h


def norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor, low: Low,
    want: bool,
) -> tuple[Tensor, Tensor | None, None]:  # fmt: skip
    want = want or (low is not None and low[2])
    dn, (dh, lora_a, _) = _with(_rows(dn), low)
    x, residual = _rows(x), _rows(residual)
    tokens, columns = x.shape
    dx = x.new_empty(tokens, columns)
    if tokens == 0:
        return dx, dn if want else None, None
    block = _tile("norm_backward" if dh is None else "norm_backward_low", lora_a, dn)
    with _on(x):
        norm_backward_kernel[(triton.cdiv(tokens, block["BLOCK_M"]),)](
            dn, x, weight.contiguous(), bias.contiguous(), residual, dh, lora_a, dx,
            dn if want else None, tokens, columns, 0 if dh is None else dh.shape[1],
            dn.stride(0), x.stride(0), residual.stride(0), 0 if dh is None else dh.stride(0), eps,
            LOW=dh is not None, WANT=want, PRECISION=precision(dn.dtype), **block,
        )  # fmt: skip
    return dx, dn if want else None, None


def gelu(u: Tensor, lora_a=None) -> tuple[Tensor, Tensor | None]:
    u, lora_a = _rows(u), _factor(lora_a, u.dtype)
    tokens, columns = u.shape
    g = u.new_empty(tokens, columns)
    h = None if lora_a is None else u.new_empty(tokens, lora_a.shape[0])
    if tokens == 0:
        return g, h
    block = _tile("gelu" if h is None else "gelu_down", lora_a, u)
    with _on(u):
        gelu_kernel[(triton.cdiv(tokens, block["BLOCK_M"]),)](
            u, lora_a, g, h, tokens, columns, 0 if h is None else h.shape[1], u.stride(0),
            DOWN=h is not None, PRECISION=precision(u.dtype), **block,
        )  # fmt: skip
    return g, h


def gelu_backward(
    dg: Tensor, u: Tensor, low: Low, want: bool, up: Up = None, sums=None
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, Tensor | None] | None]:
    dg, (dh, lora_a, need_a) = _with(_rows(dg), low)
    u = _rows(u)
    tokens, columns = u.shape
    want = want or (dh is None and low is not None and low[2])
    g = u.new_empty(tokens, columns) if want else None
    da = lora_a.new_empty(lora_a.shape) if need_a else None
    if tokens == 0:
        return dg, g, None if da is None else da.zero_(), None
    ranks = 0 if dh is None else dh.shape[1]
    if up is not None and not _along(dg, ranks, up[1].shape[1]):
        up = None
    block = _tile("gelu_backward_low" if up or ranks else "gelu_backward", lora_a, dg)
    blocks = triton.cdiv(columns, block["BLOCK_N"])
    z, lora_b, scaling = up or (None, None, 1.0)
    z, lora_b = None if z is None else _rows(z), None if up is None else lora_b.contiguous()
    dz = None if up is None else dg.new_empty(tokens, lora_b.shape[1])
    db = None if z is None else lora_b.new_empty(lora_b.shape)
    rows = chunk_rows(tokens, block["BLOCK_M"]) if need_a or up else block["BLOCK_M"]
    chunks = triton.cdiv(tokens, rows)
    part, dz_part, db_part = (
        None if t is None else u.new_empty(count, *t.shape, dtype=torch.float32)
        for count, t in ((chunks, da), (blocks, dz), (chunks, db))
    )
    with _on(u):
        gelu_backward_kernel[(chunks, blocks)](
            dg, u, dh, lora_a, g, part, z, lora_b, dz_part, db_part, tokens, columns, ranks,
            0 if up is None else dz.shape[1], rows, dg.stride(0), u.stride(0),
            0 if dh is None else dh.stride(0), 0 if z is None else z.stride(0), scaling,
            LOW=dh is not None, WANT=want, NEED_DA=need_a, UP=up is not None,
            NEED_DB=z is not None, PRECISION=precision(dg.dtype), **block,
            RANKS=ranks if ranks <= FEW else 0,
        )  # fmt: skip
        waiting = Sums() if sums is None else sums
        for partials, grad in ((part, da), (db_part, db)):
            if grad is not None:
                waiting.add(partials, grad, add_up)
        if up is not None:
            add_up(waiting, dz_part, dz, 1, dz.shape[1])
        if sums is None:
            waiting.finish()
    return dg, g, da, None if up is None else (dz, db)


def _along(dg, ranks, b_ranks):
    """Whether dz and dB of the layer before are made beside du."""
    tokens, columns = dg.shape
    blocks = triton.cdiv(columns, _tile("gelu_backward_low", None, dg)["BLOCK_N"])
    return costs.along(tokens, blocks, ranks, b_ranks, dg.element_size())


def _factor(lora_a, dtype):
    """lora_a where it rides along, or None."""
    if lora_a is None or lora_a.shape[0] > MAX_RANK[dtype.itemsize]:
        return None
    return lora_a.contiguous()


def _with(d, low):
    """d, and low where it rides along; wide updates are added before the launch."""
    if low is None:
        return d, (None, None, False)
    dh, lora_a, need_a = low
    if _factor(lora_a, d.dtype) is None:
        return d.addmm_(dh, lora_a.to(d.dtype)), (None, None, False)
    return d, (_rows(dh), lora_a.contiguous(), need_a)


def _tile(stage, lora_a, rows):
    """Rows that are no multiple of sixteen elements take an address for each element."""
    stage = stage if rows.shape[1] % 16 == 0 else "unaligned"
    block = tile(TILES, stage, 1 if lora_a is None else lora_a.shape[0], rows)
    return block | {"num_stages": 2}


def _rows(x):
    """A matrix whose rows are contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _on(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
