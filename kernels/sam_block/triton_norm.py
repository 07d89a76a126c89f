# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of rows, with the products that read the same rows, forward and backward.

A program has BLOCK_M rows and walks their columns twice, the second time out of a cache. The first
walk gives mean and variance, of x less the row's first element. These smaller numbers lose no
digits when the mean is far from zero.
"""

import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.sam_block import costs


@triton.jit
def sum_tile(
    x_ptr, update_ptr, rows, offs, stride_xm, stride_um, inside, ADD: tl.constexpr,
    total_type: tl.constexpr,
):  # fmt: skip
    """x, or x + update, rounded as it is stored, in float32; zeros outside. rows, offs broadcast"""
    x = tl.load(x_ptr + rows * stride_xm + offs, inside, other=0.0).to(tl.float32)
    if ADD:
        update = tl.load(update_ptr + rows * stride_um + offs, inside, other=0.0)
        x = (x + update.to(tl.float32)).to(total_type).to(tl.float32)
    return x


@triton.jit
def merge(mean, spread, s, inside, before, here):
    """Mean and Σ (s − mean)² of ``before`` columns and of ``here`` more, the tile s (M, N)."""
    mean_here = tl.sum(s, 1) / here
    apart = tl.where(inside, s - mean_here[:, None], 0.0)
    step = mean_here - mean
    share = here / (before + here)
    return mean + step * share, spread + tl.sum(apart * apart, 1) + step * step * (before * share)


@triton.jit(launch_metadata=launched(__package__, costs.norm_kernel, "n_ptr"))
def norm_kernel(
    x_ptr,
    update_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
    total_ptr,
    n_ptr,
    h_ptr,
    tokens,
    columns,
    ranks,
    stride_xm,
    stride_um,
    eps,
    ADD: tl.constexpr,
    DOWN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """n = LayerNorm(x), or of total = x + update, which is stored too; h = n Aᵀ."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < tokens
    kind = total_ptr.dtype.element_ty if ADD else tl.float32
    pivot = sum_tile(x_ptr, update_ptr, rows, 0, stride_xm, stride_um, live, ADD, kind)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    spread = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, columns, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (offs_n[None, :] < columns)
        x = sum_tile(
            x_ptr, update_ptr, rows[:, None], offs_n[None, :], stride_xm, stride_um, inside, ADD,
            kind,
        )  # fmt: skip
        if ADD:
            tl.store(total_ptr + rows[:, None] * columns + offs_n[None, :], x.to(kind), inside)
        s = tl.where(inside, x - pivot[:, None], 0.0)
        here = tl.minimum(columns - first, BLOCK_N)
        mean, spread = merge(mean, spread, s, inside, first, here)
    rstd = tl.rsqrt(spread / columns + eps)

    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, columns, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (offs_n[None, :] < columns)
        # Not what was stored above: another thread may have stored it.
        x = sum_tile(
            x_ptr, update_ptr, rows[:, None], offs_n[None, :], stride_xm, stride_um, inside, ADD,
            kind,
        )  # fmt: skip
        weight = tl.load(weight_ptr + offs_n, offs_n < columns, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_n, offs_n < columns, other=0.0).to(tl.float32)
        n = (x - pivot[:, None] - mean[:, None]) * rstd[:, None]
        n = tl.where(inside, n * weight[None, :] + bias[None, :], 0.0)
        n = n.to(n_ptr.dtype.element_ty)
        tl.store(n_ptr + rows[:, None] * columns + offs_n[None, :], n, inside)
        if DOWN:
            a_inside = (offs_n[:, None] < columns) & (offs_r[None, :] < ranks)
            a = tl.load(a_ptr + offs_r[None, :] * columns + offs_n[:, None], a_inside, other=0.0)
            acc += tl.dot(n, a.to(n.dtype), input_precision=PRECISION)  # (BLOCK_M, BLOCK_R)
    if DOWN:
        out = live[:, None] & (offs_r[None, :] < ranks)
        h_at = h_ptr + rows[:, None] * ranks + offs_r[None, :]
        tl.store(h_at, acc.to(h_ptr.dtype.element_ty), out)


@triton.jit
def add_low(
    d, dh, a_ptr, offs_n, columns, ranks, LOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """d (M, N) + dh (M, R) A, in float32."""
    d = d.to(tl.float32)
    if LOW:
        offs_r = tl.arange(0, BLOCK_R)
        a_inside = (offs_r[:, None] < ranks) & (offs_n[None, :] < columns)
        a = tl.load(a_ptr + offs_r[:, None] * columns + offs_n[None, :], a_inside, other=0.0)
        d += tl.dot(dh, a.to(dh.dtype), input_precision=PRECISION)
    return d


@triton.jit(launch_metadata=launched(__package__, costs.norm_backward_kernel, "dn_ptr"))
def norm_backward_kernel(
    dn_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    dh_ptr,
    a_ptr,
    dx_ptr,
    n_ptr,
    tokens,
    columns,
    ranks,
    stride_dm,
    stride_xm,
    stride_rm,
    stride_hm,
    eps,
    LOW: tl.constexpr,
    WANT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dx = residual + the gradient of n = LayerNorm(x), dn + dh A, sent through it; n may be dn.

    n has dn's strides.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < tokens
    dh = 0.0
    if LOW:
        offs_r = tl.arange(0, BLOCK_R)
        dh_inside = live[:, None] & (offs_r[None, :] < ranks)
        dh_at = dh_ptr + rows[:, None] * stride_hm + offs_r[None, :]
        dh = tl.load(dh_at, dh_inside, other=0.0)  # (BLOCK_M, BLOCK_R)
    pivot = tl.load(x_ptr + rows * stride_xm, live, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    spread = tl.zeros((BLOCK_M,), tl.float32)
    sum_g = tl.zeros((BLOCK_M,), tl.float32)
    sum_gs = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, columns, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (offs_n[None, :] < columns)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_n[None, :], inside, other=0.0)
        d = tl.load(dn_ptr + rows[:, None] * stride_dm + offs_n[None, :], inside, other=0.0)
        weight = tl.load(weight_ptr + offs_n, offs_n < columns, other=0.0).to(tl.float32)
        g = add_low(d, dh, a_ptr, offs_n, columns, ranks, LOW, PRECISION, BLOCK_R)
        g = tl.where(inside, g * weight[None, :], 0.0)
        s = tl.where(inside, x.to(tl.float32) - pivot[:, None], 0.0)
        sum_g += tl.sum(g, 1)
        sum_gs += tl.sum(g * s, 1)
        here = tl.minimum(columns - first, BLOCK_N)
        mean, spread = merge(mean, spread, s, inside, first, here)
    rstd = tl.rsqrt(spread / columns + eps)
    mean_g = sum_g / columns
    mean_gn = (sum_gs - mean * sum_g) * rstd / columns  # of g times the normalised x

    for first in range(0, columns, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (offs_n[None, :] < columns)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_n[None, :], inside, other=0.0)
        dn_at = rows[:, None] * stride_dm + offs_n[None, :]
        d = tl.load(dn_ptr + dn_at, inside, other=0.0)
        weight = tl.load(weight_ptr + offs_n, offs_n < columns, other=0.0).to(tl.float32)
        residual_at = residual_ptr + rows[:, None] * stride_rm + offs_n[None, :]
        residual = tl.load(residual_at, inside, other=0.0).to(tl.float32)
        g = add_low(d, dh, a_ptr, offs_n, columns, ranks, LOW, PRECISION, BLOCK_R)
        n = (x.to(tl.float32) - pivot[:, None] - mean[:, None]) * rstd[:, None]
        dx = (g * weight[None, :] - mean_g[:, None] - n * mean_gn[:, None]) * rstd[:, None]
        dx_at = dx_ptr + rows[:, None] * columns + offs_n[None, :]
        tl.store(dx_at, (dx + residual).to(dx_ptr.dtype.element_ty), inside)
        if WANT:
            bias = tl.load(bias_ptr + offs_n, offs_n < columns, other=0.0).to(tl.float32)
            n = n * weight[None, :] + bias[None, :]
            tl.debug_barrier()  # no thread stores over a dn that another has yet to load
            tl.store(n_ptr + dn_at, n.to(n_ptr.dtype.element_ty), inside)
