# SPDX-License-Identifier: Apache-2.0
"""The four rank-r stages of the engine as Triton kernels; see torch_path for what each computes.

A first launch sums over rows per chunk of rows (or per block of columns) and writes partials. A
second launch adds them in a fixed order: no atomics, the same bits every time. The chunks depend
only on the sizes. If partials would take too much memory, both launches repeat, some chunks at a
time. Derivations, bytes and launches are in this folder's README.
"""

import contextlib
from pathlib import Path

import torch
import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels._common.philox import threshold as keep_threshold
from samfast.kernels._common.tiles import tile
from samfast.kernels._common.triton_philox import dropout_tile
from samfast.kernels.lora_linear import costs
from samfast.kernels.lora_linear.engine import MAX_CHUNKS, Sums, chunks_at_a_time

TILES = Path(__file__).with_name("tiles.json")
MAX_GRADS, SUMMED = 3, 512  # gradients that a launch of reduce_kernel adds up; numbers a program


@triton.jit(launch_metadata=launched(__package__, costs.down_kernel, "x_ptr"))
def down_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    seed_ptr,
    tokens,
    columns,
    ranks,
    stride_xm,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h = drop(x) Aᵀ; one program per BLOCK_M rows, x is read once."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, columns, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < tokens) & (offs_k[None, :] < columns)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], inside, other=0.0)
        if DROPOUT:
            seed = tl.load(seed_ptr)
            x = dropout_tile(x, seed, rows, first, columns, threshold, scale, BLOCK_M, BLOCK_K)
        a_inside = (offs_k[:, None] < columns) & (offs_r[None, :] < ranks)
        a = tl.load(a_ptr + offs_r[None, :] * columns + offs_k[:, None], a_inside, other=0.0)
        acc += tl.dot(x, a.to(x.dtype), input_precision=PRECISION)  # (BLOCK_M, BLOCK_R)
    out = (rows[:, None] < tokens) & (offs_r[None, :] < ranks)
    tl.store(h_ptr + rows[:, None] * ranks + offs_r[None, :], acc.to(h_ptr.dtype.element_ty), out)


@triton.jit
def slice_start(index, start0, start1, start2):
    return tl.where(index == 0, start0, tl.where(index == 1, start1, start2))


@triton.jit(launch_metadata=launched(__package__, costs.up_kernel, "z_ptr"))
def up_kernel(
    y_ptr,
    z_ptr,
    b_ptr,
    tokens,
    length,
    rank,
    stride_ym,
    stride_zm,
    start0,
    start1,
    start2,
    scaling,
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y += s · z Bᵀ in place; one program per tile of y."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.cdiv(length, BLOCK_N)
    index = tl.program_id(1) // blocks
    offs_n = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    z_column = index * rank if OWN else 0
    z_inside = (rows[:, None] < tokens) & (offs_r[None, :] < rank)
    z_at = rows[:, None] * stride_zm + z_column + offs_r[None, :]
    z = tl.load(z_ptr + z_at, z_inside, other=0.0)  # (BLOCK_M, BLOCK_R)
    b_inside = (offs_n[None, :] < length) & (offs_r[:, None] < rank)
    b_at = (index * length + offs_n[None, :]) * rank + offs_r[:, None]
    b = tl.load(b_ptr + b_at, b_inside, other=0.0)  # (BLOCK_R, BLOCK_N)
    update = tl.dot(z, b.to(z.dtype), input_precision=PRECISION) * scaling
    inside = (rows[:, None] < tokens) & (offs_n[None, :] < length)
    start = slice_start(index, start0, start1, start2)
    y_at = y_ptr + rows[:, None] * stride_ym + start + offs_n[None, :]
    y = tl.load(y_at, inside, other=0.0)
    tl.store(y_at, (y.to(tl.float32) + update).to(y.dtype), inside)


@triton.jit(launch_metadata=launched(__package__, costs.up_backward_kernel, "dy_ptr"))
def up_backward_kernel(
    dy_ptr,
    z_ptr,
    b_ptr,
    dz_part_ptr,
    db_part_ptr,
    tokens,
    length,
    rank,
    chunk_rows,
    b_rows,
    stride_ym,
    stride_zm,
    start0,
    start1,
    start2,
    scaling,
    OWN: tl.constexpr,
    NEED_DB: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partials of dz = s · dy B (per column block) and dB = s · dyᵀ z (per row chunk).

    dz_part (column blocks, tokens, rank); db_part (chunks, n·L, rank); dy is read once.
    """
    chunk, column_block = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(length, BLOCK_N)
    index = column_block // blocks
    offs_n = (column_block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    start = slice_start(index, start0, start1, start2)
    z_column = index * rank if OWN else 0
    b_inside = (offs_n[:, None] < length) & (offs_r[None, :] < rank)
    b_at = (index * length + offs_n[:, None]) * rank + offs_r[None, :]
    b = tl.load(b_ptr + b_at, b_inside, other=0.0)  # (BLOCK_N, BLOCK_R)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for first in range(0, chunk_rows, BLOCK_M):
        rows = chunk.to(tl.int64) * chunk_rows + first + tl.arange(0, BLOCK_M)
        live = rows[:, None] < tokens
        dy_at = rows[:, None] * stride_ym + start + offs_n[None, :]
        dy = tl.load(dy_ptr + dy_at, live & (offs_n[None, :] < length), other=0.0)
        dz = tl.dot(dy, b.to(dy.dtype), input_precision=PRECISION) * scaling
        narrow = live & (offs_r[None, :] < rank)
        dz_at = (column_block.to(tl.int64) * tokens + rows[:, None]) * rank + offs_r[None, :]
        tl.store(dz_part_ptr + dz_at, dz, narrow)
        if NEED_DB:
            z_at = rows[:, None] * stride_zm + z_column + offs_r[None, :]
            z = tl.load(z_ptr + z_at, narrow, other=0.0)  # (BLOCK_M, BLOCK_R)
            acc += tl.dot(tl.trans(dy), z, input_precision=PRECISION)
    if NEED_DB:
        db_at = (chunk.to(tl.int64) * b_rows * rank) + b_at
        tl.store(db_part_ptr + db_at, acc * scaling, b_inside)


@triton.jit
def sum_partials(part_ptr, base, n, parts, offs):
    """Σ over parts, in order, of the elements offs of arrays of n floats. offs int64.

    Eight loads stand before the first addition. So ptxas keeps four in flight, one by one two.
    """
    total = tl.zeros(offs.shape, tl.float32)
    at = base + offs
    for first in range(0, parts, 8):
        loaded = ()
        for i in tl.static_range(8):
            inside = offs < tl.where(first + i < parts, n, 0)
            loaded += (tl.load(part_ptr + at, inside, other=0.0),)
            at += n
        for i in tl.static_range(8):
            total += loaded[i]
    return total


@triton.jit
def sum_block(part_ptr, grad_ptr, size, parts, block, BLOCK: tl.constexpr):
    """Add up one block of a gradient; nothing where the gradient has no such block."""
    if (block >= 0) & (block * BLOCK < size):
        offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = sum_partials(part_ptr, 0, size, parts, offs)
        tl.store(grad_ptr + offs, total.to(grad_ptr.dtype.element_ty), offs < size)


@triton.jit(launch_metadata=launched(__package__))
def reduce_kernel(
    dz_part_ptr,
    dz_ptr,
    dz_size,
    dz_parts,
    dz_blocks,
    groups,
    rank,
    part0_ptr,
    grad0_ptr,
    size0,
    parts0,
    part1_ptr,
    grad1_ptr,
    size1,
    parts1,
    part2_ptr,
    grad2_ptr,
    size2,
    parts2,
    HAS_DZ: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second stages in one launch: dz per group of column blocks, and up to three weight gradients.

    Programs have dz's blocks first, and then those of each gradient.
    """
    pid = tl.program_id(0)
    if HAS_DZ:
        if pid < groups * dz_blocks:
            group = (pid // dz_blocks).to(tl.int64)
            offs = (pid % dz_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            total = sum_partials(dz_part_ptr, group * dz_parts * dz_size, dz_size, dz_parts, offs)
            # element offs of this group's (tokens, rank) within (tokens, groups, rank)
            at = offs + (offs // rank) * ((groups - 1) * rank) + group * rank
            tl.store(dz_ptr + at, total.to(dz_ptr.dtype.element_ty), offs < dz_size)
    block = pid - groups * dz_blocks
    if GRADS > 0:
        sum_block(part0_ptr, grad0_ptr, size0, parts0, block, BLOCK)
    if GRADS > 1:
        block -= tl.cdiv(size0, BLOCK)
        sum_block(part1_ptr, grad1_ptr, size1, parts1, block, BLOCK)
    if GRADS > 2:
        block -= tl.cdiv(size1, BLOCK)
        sum_block(part2_ptr, grad2_ptr, size2, parts2, block, BLOCK)


@triton.jit(launch_metadata=launched(__package__, costs.down_backward_kernel, "dh_ptr"))
def down_backward_kernel(
    dx_ptr,
    dh_ptr,
    x_ptr,
    a_ptr,
    da_part_ptr,
    seed_ptr,
    tokens,
    columns,
    ranks,
    chunk_rows,
    stride_xm,
    stride_hm,
    threshold,
    scale,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dx += drop'(dh A) in place, and partials (chunks, R, D) of dA = dhᵀ drop(x)."""
    chunk = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK_N
    offs_n = first_column + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    a_inside = (offs_r[:, None] < ranks) & (offs_n[None, :] < columns)
    a_at = offs_r[:, None] * columns + offs_n[None, :]
    a = tl.load(a_ptr + a_at, a_inside, other=0.0)  # (BLOCK_R, BLOCK_N)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in range(0, chunk_rows, BLOCK_M):
        rows = chunk * chunk_rows + first + tl.arange(0, BLOCK_M)
        inside = (rows[:, None] < tokens) & (offs_n[None, :] < columns)
        dh_at = rows[:, None] * stride_hm + offs_r[None, :]
        dh_inside = (rows[:, None] < tokens) & (offs_r[None, :] < ranks)
        dh = tl.load(dh_ptr + dh_at, dh_inside, other=0.0)  # (BLOCK_M, BLOCK_R)
        if DROPOUT:
            seed = tl.load(seed_ptr)
        if NEED_DX:
            update = tl.dot(dh, a.to(dh.dtype), input_precision=PRECISION)
            if DROPOUT:
                update = dropout_tile(
                    update, seed, rows, first_column, columns, threshold, scale, BLOCK_M, BLOCK_N
                )
            dx_at = dx_ptr + rows[:, None] * columns + offs_n[None, :]
            dx = tl.load(dx_at, inside, other=0.0)
            tl.store(dx_at, (dx.to(tl.float32) + update).to(dx.dtype), inside)
        if NEED_DA:
            x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_n[None, :], inside, other=0.0)
            if DROPOUT:
                x = dropout_tile(
                    x, seed, rows, first_column, columns, threshold, scale, BLOCK_M, BLOCK_N
                )
            acc += tl.dot(tl.trans(dh), x, input_precision=PRECISION)
    if NEED_DA:
        tl.store(da_part_ptr + chunk * ranks * columns + a_at, acc, a_inside)


def chunk_rows(tokens: int, block_m: int) -> int:
    """Rows a program sums before it writes a partial: at most MAX_CHUNKS partials."""
    return block_m * triton.cdiv(max(tokens, 1), block_m * MAX_CHUNKS)


def precision(dtype: torch.dtype) -> str:
    """float32 products in TF32 where the user allowed it for matrix products, else exactly."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def down(x, lora_a, dropout, seed):
    x, lora_a = _rows(x), lora_a.contiguous()
    tokens, columns = x.shape
    ranks = lora_a.shape[0]
    h = x.new_empty(tokens, ranks)
    if tokens == 0:
        return h
    block = tile(TILES, "down_dropout" if dropout > 0.0 else "down", ranks, x)
    block["BLOCK_K"] = block.pop("BLOCK_N")
    with _on(x):
        down_kernel[(triton.cdiv(tokens, block["BLOCK_M"]),)](
            x, lora_a, h, seed, tokens, columns, ranks, x.stride(0),
            *_drop(dropout), PRECISION=precision(x.dtype), **block,
        )  # fmt: skip
    return h


def up_(y, z, lora_b, scaling, slices):
    tokens, z, lora_b = y.shape[0], _rows(z), lora_b.contiguous()
    if tokens == 0:
        return
    block = tile(TILES, "up", slices.rank, y)
    grid = (
        triton.cdiv(tokens, block["BLOCK_M"]),
        len(slices.starts) * triton.cdiv(slices.length, block["BLOCK_N"]),
    )
    with _on(y):
        up_kernel[grid](
            y, z, lora_b, tokens, slices.length, slices.rank, y.stride(0), z.stride(0),
            *_starts(slices), scaling, OWN=slices.own, PRECISION=precision(y.dtype), **block,
        )  # fmt: skip


def up_backward(dy, z, lora_b, scaling, slices, sums=None):
    sums = Sums() if sums is None else sums
    dy, lora_b = _rows(dy), lora_b.contiguous()
    z = None if z is None else _rows(z)
    tokens, rank, n = dy.shape[0], slices.rank, len(slices.starts)
    dz = dy.new_empty(tokens, slices.width)
    db = None if z is None else lora_b.new_empty(lora_b.shape)
    if tokens == 0:
        return dz, None if db is None else db.zero_()
    block = tile(TILES, "up_backward", rank, dy)
    rows = chunk_rows(tokens, block["BLOCK_M"])
    chunks, blocks = triton.cdiv(tokens, rows), n * triton.cdiv(slices.length, block["BLOCK_N"])
    some = chunks_at_a_time(chunks, 4 * blocks * rows * rank)
    scratch = dy.new_empty(blocks * min(tokens, some * rows) * rank, dtype=torch.float32)
    db_part = None if z is None else dy.new_empty(chunks, *lora_b.shape, dtype=torch.float32)
    with _on(dy):
        for first in range(0, chunks, some):
            here = slice(first * rows, min(tokens, (first + some) * rows))
            last, count = first + some >= chunks, here.stop - here.start
            dz_part = scratch[: blocks * count * rank].view(blocks, count, rank)
            up_backward_kernel[(triton.cdiv(count, rows), blocks)](
                dy[here], None if z is None else z[here], lora_b, dz_part,
                None if z is None else db_part[first:], count, slices.length, rank, rows,
                lora_b.shape[0], dy.stride(0), 0 if z is None else z.stride(0), *_starts(slices),
                scaling, OWN=slices.own, NEED_DB=z is not None, PRECISION=precision(dy.dtype),
                **block,
            )  # fmt: skip
            if last and db is not None:
                sums.add(db_part, db, add_up)
            add_up(sums, dz_part, dz[here], n if slices.own else 1, rank)
    return dz, db


def down_backward_(dx, dh, x, lora_a, dropout, seed, sums=None):
    lora_a, dh = lora_a.contiguous(), _rows(dh)
    x = None if x is None else _rows(x)
    tokens, (ranks, columns) = dh.shape[0], lora_a.shape
    da = None if x is None else lora_a.new_empty(lora_a.shape)
    if tokens == 0:
        return None if da is None else da.zero_()
    stage = "down_backward_dropout" if dropout > 0.0 else "down_backward"
    block = tile(TILES, stage, ranks, dh)
    rows = chunk_rows(tokens, block["BLOCK_M"])
    chunks = triton.cdiv(tokens, rows)
    part = None if x is None else dh.new_empty(chunks, ranks, columns, dtype=torch.float32)
    threshold, scale, DROPOUT = _drop(dropout)
    with _on(dh):
        down_backward_kernel[(chunks, triton.cdiv(columns, block["BLOCK_N"]))](
            dx, dh, x, lora_a, part, seed, tokens, columns, ranks, rows,
            0 if x is None else x.stride(0), dh.stride(0), threshold, scale,
            NEED_DX=dx is not None, NEED_DA=x is not None, DROPOUT=DROPOUT,
            PRECISION=precision(dh.dtype), **block,
        )  # fmt: skip
        if da is not None:
            later(part, da, sums)
    return da


def later(partials, grad, sums):
    """Let a gradient wait in ``sums``; without, add it up at once."""
    waiting = Sums() if sums is None else sums
    waiting.add(partials, grad, add_up)
    if sums is None:
        waiting.finish()


def add_up(sums, dz_part=None, dz=None, groups=1, rank=1):
    """One launch: dz (tokens, groups · rank) of its partials, and gradients that wait in sums."""
    grads = sums.take(MAX_GRADS)
    dz_size = 0 if dz is None else dz_part[0].numel()
    dz_blocks = triton.cdiv(dz_size, SUMMED)
    blocks = groups * dz_blocks + sum(triton.cdiv(g.numel(), SUMMED) for _, g in grads)
    given = [v for part, g in grads for v in (part, g, g.numel(), part.shape[0])]
    given += [None, None, 0, 0] * (MAX_GRADS - len(grads))
    with _on(grads[0][1] if dz is None else dz):
        reduce_kernel[(blocks,)](
            dz_part, dz, dz_size, 0 if dz is None else dz_part.shape[0] // groups, dz_blocks,
            groups, rank, *given, HAS_DZ=dz is not None, GRADS=len(grads), BLOCK=SUMMED,
        )  # fmt: skip


def _rows(x):
    """A matrix whose rows are contiguous; what autograd saved stays as the caller laid it out."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _starts(slices):
    return (*slices.starts, 0, 0, 0)[:3]


def _drop(p):
    return keep_threshold(p), 1.0 / (1.0 - p), p > 0.0


def _on(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
