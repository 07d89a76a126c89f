# SPDX-License-Identifier: Apache-2.0
"""The branch up to z as Triton launches: one forward, two or three backward; see torch_path.

A program has a few whole rows and walks their columns twice, like the norms of sam_block: first for
mean and variance, then for the results. Weight gradients are partials of each program. If there
would be many, a separate launch makes partials of chunks of rows. The last launch adds them up in
order. Derivations, bytes and launches are in this folder's README.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from samfast.kernels._common.launched import launched
from samfast.kernels._common.philox import threshold as keep_threshold
from samfast.kernels._common.tiles import tile
from samfast.kernels._common.triton_philox import dropout_tile
from samfast.kernels.adapt_former import costs
from samfast.kernels.adapt_former.costs import MAX_ALONG
from samfast.kernels.lora_linear.triton_kernels import chunk_rows, precision
from samfast.kernels.sam_block.triton_norm import merge

TILES = Path(__file__).with_name("tiles.json")
FOLDED = 4096  # numbers of partials that a program of the second launch holds at a time


@triton.jit(launch_metadata=launched(__package__, costs.low_kernel, "z_ptr"))
def low_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    down_ptr,
    down_bias_ptr,
    z_ptr,
    seed_ptr,
    tokens,
    columns,
    ranks,
    stride_xm,
    eps,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """z = drop(ReLU(LN(x) downᵀ + b_down)); one program per BLOCK_M rows."""
    kind = z_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < tokens
    pivot = tl.load(x_ptr + rows * stride_xm, live, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    spread = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, columns, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (offs_n[None, :] < columns)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_n[None, :], inside, other=0.0)
        s = tl.where(inside, x.to(tl.float32) - pivot[:, None], 0.0)
        here = tl.minimum(columns - first, BLOCK_N)
        mean, spread = merge(mean, spread, s, inside, first, here)
    rstd = tl.rsqrt(spread / columns + eps)

    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, columns, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (offs_n[None, :] < columns)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_n[None, :], inside, other=0.0)
        weight = tl.load(weight_ptr + offs_n, offs_n < columns, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_n, offs_n < columns, other=0.0).to(tl.float32)
        n = (x.to(tl.float32) - pivot[:, None] - mean[:, None]) * rstd[:, None]
        n = tl.where(inside, n * weight[None, :] + bias[None, :], 0.0).to(kind)
        down_inside = (offs_n[:, None] < columns) & (offs_r[None, :] < ranks)
        down_at = down_ptr + offs_r[None, :] * columns + offs_n[:, None]
        down = tl.load(down_at, down_inside, other=0.0)  # (BLOCK_N, BLOCK_R)
        acc += tl.dot(n, down.to(kind), input_precision=PRECISION)  # (BLOCK_M, BLOCK_R)
    down_bias = tl.load(down_bias_ptr + offs_r, offs_r < ranks, other=0.0).to(tl.float32)
    z = acc + down_bias[None, :]
    z = tl.where(z <= 0.0, 0.0, z)  # of a NaN too, which a maximum would lose
    if DROPOUT:
        seed = tl.load(seed_ptr)
        z = dropout_tile(z, seed, rows, 0, ranks, threshold, scale, BLOCK_M, BLOCK_R)
    out = live[:, None] & (offs_r[None, :] < ranks)
    tl.store(z_ptr + rows[:, None] * ranks + offs_r[None, :], z.to(kind), out)


@triton.jit
def let_through(dz_ptr, z_ptr, rows, tokens, ranks, scale, BLOCK_R: tl.constexpr):
    """dh (rows, BLOCK_R) = what of dz the ReLU and dropout let through; zeros outside."""
    offs_r = tl.arange(0, BLOCK_R)
    narrow = (rows[:, None] < tokens) & (offs_r[None, :] < ranks)
    at = rows[:, None] * ranks + offs_r[None, :]
    z = tl.load(z_ptr + at, narrow, other=0.0)
    dz = tl.load(dz_ptr + at, narrow, other=0.0)
    return tl.where(z <= 0.0, 0.0, dz.to(tl.float32) * scale).to(dz.dtype)


@triton.jit(launch_metadata=launched(__package__, costs.low_backward_kernel, "z_ptr"))
def low_backward_kernel(
    dx_ptr,
    dz_ptr,
    z_ptr,
    x_ptr,
    weight_ptr,
    down_ptr,
    part_ptr,
    sums_ptr,
    stats_ptr,
    tokens,
    columns,
    ranks,
    stride_dm,
    stride_xm,
    eps,
    scale,
    ADD: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dx (+)= dh down sent through the LayerNorm; partials of G = dhᵀ n̂ (programs, V, D),
    n̂ = (x − mean) rstd, and of Σ dh (programs, V), or mean (of x less the row's first element) and
    rstd (2, tokens), from which they are made."""
    program = tl.program_id(0).to(tl.int64)
    rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < tokens
    offs_r = tl.arange(0, BLOCK_R)
    dh = let_through(dz_ptr, z_ptr, rows, tokens, ranks, scale, BLOCK_R)
    if NEED_PARTS:
        sums_at = sums_ptr + program * ranks + offs_r
        tl.store(sums_at, tl.sum(dh.to(tl.float32), 0), offs_r < ranks)

    pivot = tl.load(x_ptr + rows * stride_xm, live, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    spread = tl.zeros((BLOCK_M,), tl.float32)
    sum_g = tl.zeros((BLOCK_M,), tl.float32)
    sum_gs = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, columns, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (offs_n[None, :] < columns)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_n[None, :], inside, other=0.0)
        s = tl.where(inside, x.to(tl.float32) - pivot[:, None], 0.0)
        if NEED_DX:
            weight = tl.load(weight_ptr + offs_n, offs_n < columns, other=0.0).to(tl.float32)
            down_inside = (offs_r[:, None] < ranks) & (offs_n[None, :] < columns)
            down_at = down_ptr + offs_r[:, None] * columns + offs_n[None, :]
            down = tl.load(down_at, down_inside, other=0.0).to(dh.dtype)  # (BLOCK_R, BLOCK_N)
            g = tl.dot(dh, down, input_precision=PRECISION) * weight[None, :]
            sum_g += tl.sum(g, 1)
            sum_gs += tl.sum(g * s, 1)
        here = tl.minimum(columns - first, BLOCK_N)
        mean, spread = merge(mean, spread, s, inside, first, here)
    rstd = tl.rsqrt(spread / columns + eps)
    if stats_ptr is not None:
        tl.store(stats_ptr + rows, mean, live)
        tl.store(stats_ptr + tokens + rows, rstd, live)
    mean_g = sum_g / columns
    mean_gn = (sum_gs - mean * sum_g) * rstd / columns  # of g times n̂

    for first in range(0, columns, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (offs_n[None, :] < columns)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_n[None, :], inside, other=0.0)
        n = (x.to(tl.float32) - pivot[:, None] - mean[:, None]) * rstd[:, None]
        n = tl.where(inside, n, 0.0)
        if NEED_DX:
            weight = tl.load(weight_ptr + offs_n, offs_n < columns, other=0.0).to(tl.float32)
            down_inside = (offs_r[:, None] < ranks) & (offs_n[None, :] < columns)
            down_at = down_ptr + offs_r[:, None] * columns + offs_n[None, :]
            down = tl.load(down_at, down_inside, other=0.0).to(dh.dtype)
            g = tl.dot(dh, down, input_precision=PRECISION) * weight[None, :]
            dx = (g - mean_g[:, None] - n * mean_gn[:, None]) * rstd[:, None]
            dx_at = dx_ptr + rows[:, None] * stride_dm + offs_n[None, :]
            if ADD:
                dx += tl.load(dx_at, inside, other=0.0).to(tl.float32)
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), inside)
        if NEED_PARTS:
            share = tl.dot(tl.trans(dh), n.to(dh.dtype), input_precision=PRECISION)
            part_at = (program * ranks + offs_r[:, None]) * columns + offs_n[None, :]
            part_inside = (offs_r[:, None] < ranks) & (offs_n[None, :] < columns)
            tl.store(part_ptr + part_at, share, part_inside)  # (BLOCK_R, BLOCK_N)


@triton.jit(launch_metadata=launched(__package__, costs.gradient_kernel, "z_ptr"))
def gradient_kernel(
    dz_ptr,
    z_ptr,
    x_ptr,
    stats_ptr,
    part_ptr,
    sums_ptr,
    tokens,
    columns,
    ranks,
    chunk_rows,
    stride_xm,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partials of G = dhᵀ n̂ (chunks, V, D) and of Σ dh (chunks, V); one program per chunk of rows
    and block of columns."""
    chunk = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, chunk_rows, BLOCK_M):
        rows = chunk * chunk_rows + first + tl.arange(0, BLOCK_M)
        live = rows < tokens
        dh = let_through(dz_ptr, z_ptr, rows, tokens, ranks, scale, BLOCK_R)
        pivot = tl.load(x_ptr + rows * stride_xm, live, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + rows, live, other=0.0)
        rstd = tl.load(stats_ptr + tokens + rows, live, other=0.0)
        inside = live[:, None] & (offs_n[None, :] < columns)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_n[None, :], inside, other=0.0)
        n = (x.to(tl.float32) - pivot[:, None] - mean[:, None]) * rstd[:, None]
        n = tl.where(inside, n, 0.0).to(dh.dtype)
        acc += tl.dot(tl.trans(dh), n, input_precision=PRECISION)  # (BLOCK_R, BLOCK_N)
        total += tl.sum(dh.to(tl.float32), 0)
    part_at = (chunk * ranks + offs_r[:, None]) * columns + offs_n[None, :]
    tl.store(part_ptr + part_at, acc, (offs_r[:, None] < ranks) & (offs_n[None, :] < columns))
    if tl.program_id(1) == 0:
        tl.store(sums_ptr + chunk * ranks + offs_r, total, offs_r < ranks)


@triton.jit(launch_metadata=launched(__package__))
def fold_kernel(
    part_ptr,
    sums_ptr,
    weight_ptr,
    bias_ptr,
    down_ptr,
    dweight_ptr,
    dbias_ptr,
    ddown_ptr,
    ddown_bias_ptr,
    parts,
    columns,
    ranks,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """G and g from their partials, in order; d_down = G ⊙ w + g ⊗ b, d_norm_weight = Σ_j down_j ⊙
    G_j, d_norm_bias = downᵀ g, d_down_bias = g, each where it is given; one program per block of
    columns."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r, offs_p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    g = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = (first + offs_p).to(tl.int64)
        row = part[:, None] * ranks + offs_r[None, :]  # (BLOCK_P, BLOCK_R)
        live = (part[:, None] < parts) & (offs_r[None, :] < ranks)
        g += tl.sum(tl.load(sums_ptr + row, live, other=0.0), 0)
        inside = live[:, :, None] & (offs_n[None, None, :] < columns)
        at = row[:, :, None] * columns + offs_n[None, None, :]
        total += tl.sum(tl.load(part_ptr + at, inside, other=0.0), 0)
    used = offs_n < columns
    inside = (offs_r[:, None] < ranks) & used[None, :]
    at = offs_r[:, None] * columns + offs_n[None, :]
    if ddown_ptr is not None:
        weight = tl.load(weight_ptr + offs_n, used, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_n, used, other=0.0).to(tl.float32)
        ddown = total * weight[None, :] + g[:, None] * bias[None, :]
        tl.store(ddown_ptr + at, ddown.to(ddown_ptr.dtype.element_ty), inside)
    down = tl.load(down_ptr + at, inside, other=0.0).to(tl.float32)
    if dweight_ptr is not None:
        dweight = tl.sum(down * total, 0)
        tl.store(dweight_ptr + offs_n, dweight.to(dweight_ptr.dtype.element_ty), used)
    if dbias_ptr is not None:
        dbias = tl.sum(down * g[:, None], 0)
        tl.store(dbias_ptr + offs_n, dbias.to(dbias_ptr.dtype.element_ty), used)
    if ddown_bias_ptr is not None:
        if tl.program_id(0) == 0:
            kind = ddown_bias_ptr.dtype.element_ty
            tl.store(ddown_bias_ptr + offs_r, g.to(kind), offs_r < ranks)


def low(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, down: Tensor, down_bias: Tensor, eps: float,
    dropout: float, seed: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x, down = _rows(x), down.contiguous()
    tokens, (ranks, columns) = x.shape[0], down.shape
    z = x.new_empty(tokens, ranks, dtype=dtype)
    if tokens == 0:
        return z
    block = _tile("low", ranks, columns, x, z)
    with _on(x):
        low_kernel[(triton.cdiv(tokens, block["BLOCK_M"]),)](
            x, norm_weight.contiguous(), norm_bias.contiguous(), down, down_bias.contiguous(), z,
            seed, tokens, columns, ranks, x.stride(0), eps, keep_threshold(dropout),
            1.0 / (1.0 - dropout), DROPOUT=dropout > 0.0, PRECISION=precision(dtype), **block,
        )  # fmt: skip
    return z


def low_backward(
    onto: Tensor | None, dz: Tensor, z: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    down: Tensor, eps: float, dropout: float, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    x, dz, z, down = _rows(x), dz.contiguous(), z.contiguous(), down.contiguous()
    tokens, (ranks, columns) = x.shape[0], down.shape
    like = (norm_weight, norm_bias, down, down[:, 0])
    need_x, *needs = needs
    grads = [t.new_empty(t.shape) if need else None for t, need in zip(like, needs, strict=True)]
    dx = onto
    if not need_x or onto is None:
        dx = x.new_empty(x.shape) if need_x else None
    if tokens == 0:
        return [dx, *(d if d is None else d.zero_() for d in grads)]
    block, apart = _tile("low_backward", ranks, columns, x, z), None
    programs = parts = triton.cdiv(tokens, block["BLOCK_M"])
    part = sums = stats = None
    if any(needs):
        if 4 * parts * ranks * columns > MAX_ALONG:
            apart = _tile("gradient", ranks, columns, x, z)
            rows = chunk_rows(tokens, apart["BLOCK_M"])
            parts = triton.cdiv(tokens, rows)
            stats = x.new_empty(2, tokens, dtype=torch.float32)
        part = x.new_empty(parts, ranks, columns, dtype=torch.float32)
        sums = x.new_empty(parts, ranks, dtype=torch.float32)
    scale, along = 1.0 / (1.0 - dropout), any(needs) and apart is None
    with _on(x):
        low_backward_kernel[(programs,)](
            dx, dz, z, x, norm_weight.contiguous(), down, *((part, sums) if along else (None,) * 2),
            stats, tokens, columns, ranks, 0 if dx is None else dx.stride(0), x.stride(0), eps,
            scale, ADD=need_x and onto is not None, NEED_DX=need_x, NEED_PARTS=along,
            PRECISION=precision(z.dtype), **block,
        )  # fmt: skip
        if apart is not None:
            gradient_kernel[(parts, triton.cdiv(columns, apart["BLOCK_N"]))](
                dz, z, x, stats, part, sums, tokens, columns, ranks, rows, x.stride(0), scale,
                PRECISION=precision(z.dtype), **apart,
            )  # fmt: skip
        if any(needs):
            block_n, block_r = 32, block["BLOCK_R"]
            fold_kernel[(triton.cdiv(columns, block_n),)](
                part, sums, norm_weight.contiguous(), norm_bias.contiguous(), down, *grads, parts,
                columns, ranks, BLOCK_P=max(1, FOLDED // (block_n * block_r)), BLOCK_N=block_n,
                BLOCK_R=block_r, num_warps=4,
            )  # fmt: skip
    return [dx, *grads]


def _tile(stage, ranks, columns, x, z):
    """The tile for the wider of x and z. Rows whose length is not a multiple of sixteen elements
    take an address for each element."""
    wider = x if x.element_size() > z.element_size() else z
    stage = stage if columns % 16 == 0 else "unaligned"
    return tile(TILES, stage, ranks, wider) | {"num_stages": 2}


def _rows(x):
    """A matrix whose rows are contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _on(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
