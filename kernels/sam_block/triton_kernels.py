# SPDX-License-Identifier: Apache-2.0
"""The element-wise stages of the block as Triton launches; see torch_path for what each computes.

One launch a stage. It also computes h = rows Aᵀ of adapters up to MAX_RANK, and dh A in the
backward. GELU, and a norm whose rows stay in registers, also make A's gradient. GELU's backward
takes narrow adapters of the layer before it back to z too. A sum adds an update z Bᵀ itself. A
second launch adds up partials.
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
from samfast.kernels.sam_block.costs import (
    FEW_RANKS,
    MOST_LEFT,
    in_registers,
    rows_at_once,
    walked_rows,
)
from samfast.kernels.sam_block.torch_path import Back, Low, Up
from samfast.kernels.sam_block.triton_gelu import gelu_backward_kernel, gelu_kernel
from samfast.kernels.sam_block.triton_norm import norm_backward_kernel, norm_kernel
from samfast.kernels.sam_block.triton_rows import (
    add_row_kernel,
    norm_row_backward_kernel,
    norm_row_kernel,
)
from samfast.kernels.sam_block.triton_weight import joint_weight_kernel

TILES = Path(__file__).with_name("tiles.json")
AHEAD_RANKS = 4  # up to which registers hold the next rows of a norm's backward
MAX_RANK = {2: 128, 4: 32}  # by bytes per element of the rows

norm_parameters = torch_path.norm_parameters  # one launch of the library


def takes_up(lora_b: Tensor, lora_a: Tensor | None = None) -> bool:
    """Whether a sum takes lora_b's update, before a norm that makes h of lora_a, if any."""
    columns, rank = lora_b.shape
    ranks = 0 if lora_a is None else lora_a.shape[0]
    return in_registers(columns, rank) and in_registers(columns, ranks)


def room(lora_a: Tensor, lora_b: Tensor, tokens: int, dtype: torch.dtype) -> int:
    """Columns behind the rows for z, if a layer had better make its result and update by one
    product with ``joint_weight``; else 0."""
    ranks = max(lora_a.shape[0], lora_b.shape[1])  # a map between them may be wider than high
    return costs.room(tokens, lora_a.shape[1], ranks, dtype.itemsize)


def joint_weight(weight: Tensor, lora_b: Tensor, scaling: float, room: int, dtype) -> Tensor:
    weight, lora_b = _rows(weight), lora_b.contiguous()
    outputs, columns = weight.shape
    made = weight.new_empty(outputs, columns + room, dtype=dtype)
    block = tile(TILES, "joint_weight", 1, made)
    del block["BLOCK_R"]
    grid = triton.cdiv(outputs, block["BLOCK_M"]), triton.cdiv(columns + room, block["BLOCK_N"])
    with _on(weight):
        joint_weight_kernel[grid](
            weight, lora_b, made, outputs, columns, columns + room, weight.stride(0), scaling,
            RANKS=lora_b.shape[1], **block,
        )  # fmt: skip
    return made


def norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, lora_a=None,
    room: int = 0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return _norm(x, None, None, weight, bias, eps, dtype, lora_a, None, room)


def add_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
    lora_a=None, up: Up = None, room: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, update.dtype))
    return total, *_norm(x, _rows(update), total, weight, bias, eps, dtype, lora_a, up, room)


def add(x: Tensor, update: Tensor, up: Up = None) -> Tensor:
    if up is None or len(x) == 0:
        return torch_path.add(x, update)
    z, factor, scaling = up
    x, update, z = _rows(x), _rows(update), _rows(z)
    tokens, columns = x.shape
    kind = torch.promote_types(x.dtype, update.dtype)
    in_place = kind == update.dtype and update.is_contiguous()
    y = update if in_place else x.new_empty(x.shape, dtype=kind)
    block = _row_tile("add_row", x)
    with _on(x):
        add_row_kernel[(triton.cdiv(tokens, block["BLOCK_M"]), block.pop("CHUNKS"))](
            x, update, z, factor, y, tokens, columns, x.stride(0), update.stride(0), z.stride(0),
            scaling, UP=z.shape[1], **block,
        )  # fmt: skip
    return y


def _norm(x, update, total, weight, bias, eps, dtype, lora_a, up, room):
    x, lora_a = _rows(x), _factor(lora_a, dtype)
    tokens, columns = x.shape
    n = x.new_empty(tokens, columns + room, dtype=dtype)
    ranks = 0 if lora_a is None else lora_a.shape[0]
    h = None if lora_a is None else n.new_empty(tokens, ranks)
    if tokens == 0:
        return n, h
    weight, bias = weight.contiguous(), bias.contiguous()
    stride_um = 0 if update is None else update.stride(0)
    if in_registers(columns, ranks):
        z, factor, scaling = (None, None, 0.0) if up is None else (_rows(up[0]), *up[1:])
        block = _row_tile("norm_row", n[:, :columns])
        with _on(x):
            norm_row_kernel[(triton.cdiv(tokens, block["BLOCK_M"]),)](
                x, update, z, factor, weight, bias, lora_a, total, n, h, tokens, columns,
                x.stride(0), stride_um, 0 if z is None else z.stride(0), n.stride(0), scaling, eps,
                ADD=update is not None, UP=0 if z is None else z.shape[1], RANKS=ranks, ROOM=room,
                **block,
            )  # fmt: skip
        return n, h
    assert up is None and not room, "see takes_up and costs.room"
    block = _tile("norm" if h is None else "norm_down", lora_a, n)
    with _on(x):
        norm_kernel[(triton.cdiv(tokens, block["BLOCK_M"]),)](
            x, update, weight, bias, lora_a, total, n, h, tokens, columns, ranks, x.stride(0),
            stride_um, eps, ADD=update is not None, DOWN=h is not None,
            PRECISION=precision(dtype), **block,
        )  # fmt: skip
    return n, h


def norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor, low: Low,
    want: bool, sums: Sums | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    dn, (dh, lora_a, need_a) = _with(_rows(dn), low)
    x, residual = _rows(x), _rows(residual)
    weight, bias = weight.contiguous(), bias.contiguous()
    if in_registers(x.shape[1], 0 if dh is None else dh.shape[1]):
        want = want or (dh is None and low is not None and low[2])
        return _norm_row_backward(
            dn, x, weight, bias, eps, residual, dh, lora_a, need_a, want, sums
        )
    want = want or (low is not None and low[2])
    tokens, columns = x.shape
    dx = x.new_empty(tokens, columns)
    if tokens == 0:
        return dx, dn if want else None, None
    block = _tile("norm_backward" if dh is None else "norm_backward_low", lora_a, dn)
    with _on(x):
        norm_backward_kernel[(triton.cdiv(tokens, block["BLOCK_M"]),)](
            dn, x, weight, bias, residual, dh, lora_a, dx, dn if want else None, tokens, columns,
            0 if dh is None else dh.shape[1], dn.stride(0), x.stride(0), residual.stride(0),
            0 if dh is None else dh.stride(0), eps, LOW=dh is not None, WANT=want,
            PRECISION=precision(dn.dtype), **block,
        )  # fmt: skip
    return dx, dn if want else None, None


def _norm_row_backward(dn, x, weight, bias, eps, residual, dh, lora_a, need_a, want, sums):
    tokens, columns = x.shape
    dx, rows = x.new_empty(tokens, columns), dn if want else None
    da = lora_a.new_empty(lora_a.shape) if need_a else None
    if tokens == 0:
        return dx, rows, None if da is None else da.zero_()
    block = _row_tile("norm_row_backward", dn) | {"BLOCK_M": rows_at_once(columns)}
    chunk_rows = walked_rows(tokens, columns, need_a)
    chunks = triton.cdiv(tokens, chunk_rows)
    part = x.new_empty(chunks, *lora_a.shape, dtype=torch.float32) if need_a else None
    with _on(x):
        norm_row_backward_kernel[(chunks,)](
            dn, x, weight, bias, residual, dh, lora_a, dx, rows, part, tokens, columns,
            chunk_rows, dn.stride(0), x.stride(0), residual.stride(0),
            0 if dh is None else dh.stride(0), eps, RANKS=0 if dh is None else dh.shape[1],
            NEED_DA=need_a, WANT=want, AHEAD=dh is None or dh.shape[1] <= AHEAD_RANKS, **block,
        )  # fmt: skip
        _add_up([(part, da)], sums)
    return dx, rows, da


def _add_up(made, sums, *dz):
    """Add up the partials of dz; those made, (partials, gradient), as well, or let them wait."""
    waiting = Sums() if sums is None else sums
    for partials, grad in made:
        if grad is not None:
            waiting.add(partials, grad, add_up)
    if dz:
        add_up(waiting, *dz)
    if sums is None:
        waiting.finish()


def left_to_gelu(lora_b: Tensor) -> bool:
    """Whether GELU takes the update of the layer before."""
    return lora_b.shape[1] <= MOST_LEFT


def gelu(u: Tensor, lora_a=None, lacks: Back = None) -> tuple[Tensor, Tensor | None]:
    u, lora_a = _rows(u), _factor(lora_a, u.dtype)
    tokens, columns = u.shape
    g = u.new_empty(tokens, columns)
    h = None if lora_a is None else u.new_empty(tokens, lora_a.shape[0])
    if tokens == 0:
        return g, h
    z, lora_b, scaling = _taken(lacks)
    block = _tile("gelu" if h is None else "gelu_down", lora_a, u)
    with _on(u):
        gelu_kernel[(triton.cdiv(tokens, block["BLOCK_M"]),)](
            u, z, lora_b, lora_a, g, h, tokens, columns, 0 if h is None else h.shape[1],
            u.stride(0), 0 if z is None else z.stride(0), scaling,
            LEFT=0 if z is None else z.shape[1], DOWN=h is not None, PRECISION=precision(u.dtype),
            **block,
        )  # fmt: skip
    return g, h


def gelu_backward(
    dg: Tensor,
    u: Tensor,
    low: Low,
    want: bool,
    back: Back = None,
    sums: Sums | None = None,
    lacks: Back = None,
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
    if back is not None and not _along(dg, ranks, back[1].shape[1]):
        back = None
    z, lora_b, scaling = _taken(lacks or back)
    need_db = back is not None and back[0] is not None
    block = _tile("gelu_backward_low" if back or ranks else "gelu_backward", lora_a, dg)
    blocks = triton.cdiv(columns, block["BLOCK_N"])
    dz = None if back is None else dg.new_empty(tokens, lora_b.shape[1])
    db = lora_b.new_empty(lora_b.shape) if need_db else None
    rows = chunk_rows(tokens, block["BLOCK_M"]) if need_a or back else block["BLOCK_M"]
    chunks = triton.cdiv(tokens, rows)
    part, dz_part, db_part = (
        None if t is None else u.new_empty(count, *t.shape, dtype=torch.float32)
        for count, t in ((chunks, da), (blocks, dz), (chunks, db))
    )
    with _on(u):
        gelu_backward_kernel[(chunks, blocks)](
            dg, u, dh, lora_a, g, part, z, lora_b, dz_part, db_part, tokens, columns, ranks,
            0 if back is None else dz.shape[1], rows, dg.stride(0), u.stride(0),
            0 if dh is None else dh.stride(0), 0 if z is None else z.stride(0), scaling,
            LOW=dh is not None, WANT=want, NEED_DA=need_a, UP=back is not None,
            NEED_DB=need_db, LEFT=0 if lacks is None else z.shape[1],
            PRECISION=precision(dg.dtype), RANKS=ranks if ranks <= FEW_RANKS else 0, **block,
        )  # fmt: skip
        of_dz = () if back is None else (dz_part, dz, 1, dz.shape[1])
        _add_up([(part, da), (db_part, db)], sums, *of_dz)
    return dg, g, da, None if back is None else (dz, db)


def _taken(before):
    """z, lora_b and the scaling of the layer before."""
    if before is None:
        return None, None, 1.0
    z, lora_b, scaling = before
    return None if z is None else _rows(z), lora_b.contiguous(), scaling


def _along(dg, ranks, b_ranks):
    """Whether dz and dB of the layer before are made with du."""
    tokens, columns = dg.shape
    blocks = triton.cdiv(columns, _tile("gelu_backward_low", None, dg)["BLOCK_N"])
    return costs.along(tokens, blocks, ranks, b_ranks, dg.element_size())


def _factor(lora_a, dtype):
    """lora_a if this launch also multiplies by it, or None."""
    if lora_a is None or lora_a.shape[0] > MAX_RANK[dtype.itemsize]:
        return None
    return lora_a.contiguous()


def _with(d, low):
    """d, and low if the launch takes it; wide updates are added before the launch."""
    if low is None:
        return d, (None, None, False)
    dh, lora_a, need_a = low
    if _factor(lora_a, d.dtype) is None:
        return d.addmm_(dh, lora_a.to(d.dtype)), (None, None, False)
    return d, (_rows(dh), lora_a.contiguous(), need_a)


def _tile(stage, lora_a, rows):
    """Rows that are not a multiple of sixteen elements take an address for each element."""
    stage = stage if rows.shape[1] % 16 == 0 else "unaligned"
    block = tile(TILES, stage, 1 if lora_a is None else lora_a.shape[0], rows)
    return block | {"num_stages": 2}


def _row_tile(stage, rows):
    """The tile of a kernel that keeps whole rows, and whether it divides them."""
    block = tile(TILES, stage, 1, rows)
    del block["BLOCK_R"]
    chunks = triton.cdiv(rows.shape[1], block["BLOCK_N"])
    return block | {"CHUNKS": chunks, "FULL": rows.shape[1] % block["BLOCK_N"] == 0}


def _rows(x):
    """A matrix whose rows are contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _on(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
