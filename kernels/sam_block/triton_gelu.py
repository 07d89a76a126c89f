# SPDX-License-Identifier: Apache-2.0
"""The exact GELU, u Φ(u), of rows with what can be done while they are at hand."""

import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.sam_block import costs


@triton.jit
def below(u):
    """Φ(u), the normal distribution function; 0.7071… = 1/√2."""
    return 0.5 * (1.0 + tl.math.erf(u * 0.7071067811865476))


@triton.jit(launch_metadata=launched(__package__, costs.gelu_kernel, "u_ptr"))
def gelu_kernel(
    u_ptr,
    a_ptr,
    g_ptr,
    h_ptr,
    tokens,
    columns,
    ranks,
    stride_um,
    DOWN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """g = gelu(u) and h = g Aᵀ; one program per BLOCK_M rows, u is read once."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, columns, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = (rows[:, None] < tokens) & (offs_n[None, :] < columns)
        u = tl.load(u_ptr + rows[:, None] * stride_um + offs_n[None, :], inside, other=0.0)
        wide = u.to(tl.float32)
        # With a mask Triton does not compute g a second time, as an operand of the product.
        g = tl.where(inside, wide * below(wide), 0.0).to(u.dtype)
        tl.store(g_ptr + rows[:, None] * columns + offs_n[None, :], g, inside)
        if DOWN:
            a_inside = (offs_n[:, None] < columns) & (offs_r[None, :] < ranks)
            a = tl.load(a_ptr + offs_r[None, :] * columns + offs_n[:, None], a_inside, other=0.0)
            acc += tl.dot(g, a.to(g.dtype), input_precision=PRECISION)  # (BLOCK_M, BLOCK_R)
    if DOWN:
        out = (rows[:, None] < tokens) & (offs_r[None, :] < ranks)
        h_at = h_ptr + rows[:, None] * ranks + offs_r[None, :]
        tl.store(h_at, acc.to(h_ptr.dtype.element_ty), out)


@triton.jit(launch_metadata=launched(__package__, costs.gelu_backward_kernel, "dg_ptr"))
def gelu_backward_kernel(
    dg_ptr,
    u_ptr,
    dh_ptr,
    a_ptr,
    g_ptr,
    da_part_ptr,
    tokens,
    columns,
    ranks,
    chunk_rows,
    stride_dm,
    stride_um,
    stride_hm,
    LOW: tl.constexpr,
    WANT: tl.constexpr,
    NEED_DA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """du = (dg + dh A) (Φ(u) + u φ(u)) in dg's place, g = gelu(u), and partials (chunks, R, D) of
    dA = dhᵀ g; one program per chunk of rows and block of columns."""
    chunk = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    a_inside = (offs_r[:, None] < ranks) & (offs_n[None, :] < columns)
    a_at = offs_r[:, None] * columns + offs_n[None, :]
    if LOW:
        a = tl.load(a_ptr + a_at, a_inside, other=0.0).to(dh_ptr.dtype.element_ty)  # (R, N)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in range(0, chunk_rows, BLOCK_M):
        rows = chunk * chunk_rows + first + tl.arange(0, BLOCK_M)
        inside = (rows[:, None] < tokens) & (offs_n[None, :] < columns)
        dg_at = dg_ptr + rows[:, None] * stride_dm + offs_n[None, :]
        dg = tl.load(dg_at, inside, other=0.0)
        u = tl.load(u_ptr + rows[:, None] * stride_um + offs_n[None, :], inside, other=0.0)
        d, u = dg.to(tl.float32), u.to(tl.float32)
        if LOW:
            dh_at = dh_ptr + rows[:, None] * stride_hm + offs_r[None, :]
            dh_inside = (rows[:, None] < tokens) & (offs_r[None, :] < ranks)
            dh = tl.load(dh_at, dh_inside, other=0.0)  # (BLOCK_M, BLOCK_R)
            d += tl.dot(dh, a, input_precision=PRECISION)
        share = below(u)
        density = tl.exp(-0.5 * u * u) * 0.3989422804014327  # 1/√(2π)
        tl.store(dg_at, (d * (share + u * density)).to(dg.dtype), inside)
        if WANT or NEED_DA:
            g = tl.where(inside, u * share, 0.0).to(dg.dtype)
        if WANT:
            tl.store(g_ptr + rows[:, None] * columns + offs_n[None, :], g, inside)
        if NEED_DA:
            acc += tl.dot(tl.trans(dh), g, input_precision=PRECISION)  # (BLOCK_R, BLOCK_N)
    if NEED_DA:
        tl.store(da_part_ptr + chunk * ranks * columns + a_at, acc, a_inside)
