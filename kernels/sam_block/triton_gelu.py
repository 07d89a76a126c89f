# SPDX-License-Identifier: Apache-2.0
"""The exact GELU, u Φ(u), of rows, with the products that read the same rows."""

import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.sam_block import costs


@triton.jit
def normal(u):
    """Φ(u) and exp(−u²/2), of the normal distribution.

    Its tail is exp(−u²/2) times a polynomial in t = 1 / (1 + 0.3 |u|), fitted to a relative error
    of 4e-9. That is a third of erff's instructions, and the density shares the exponential.
    """
    root = tl.rsqrt(tl.abs(u) * 0.3 + 1.0)
    t = root * root
    bell = tl.exp2(u * u * -0.7213475204444817)  # 1/(2 ln 2)
    q = t * -0.0206128289 + 0.112375774
    q = q * t - 0.228067501
    q = q * t + 0.191581673
    q = q * t - 0.0792473176
    q = q * t + 0.0960578152
    q = q * t + 0.0784255853
    q = q * t + 0.110227323
    q = q * t + 0.119572841
    q = (q * t + 0.119686634) * t * bell
    return tl.where(u < 0.0, q, 1.0 - q), bell


@triton.jit
def columns_of(ptr, at, step, known, COUNT: tl.constexpr):
    """COUNT vectors in float32, each ``step`` elements after the one before."""
    found = ()
    for r in tl.static_range(COUNT):
        found += (tl.load(ptr + at + r * step, known, other=0.0).to(tl.float32),)
    return found


@triton.jit
def updated(u, z, b, scaling, COUNT: tl.constexpr):
    """u + scaling · z Bᵀ of COUNT columns z and b, all in float32."""
    for r in tl.static_range(COUNT):
        u += (z[r] * scaling)[:, None] * b[r][None, :]
    return u


@triton.jit(launch_metadata=launched(__package__, costs.gelu_kernel, "u_ptr"))
def gelu_kernel(
    u_ptr,
    z_ptr,
    b_ptr,
    a_ptr,
    g_ptr,
    h_ptr,
    tokens,
    columns,
    ranks,
    stride_um,
    stride_zm,
    scaling,
    LEFT: tl.constexpr,
    DOWN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """g = gelu(u) and h = g Aᵀ; one program per BLOCK_M rows, u is read once.

    LEFT: columns of z, where scaling · z Bᵀ is yet to be added to u; else 0
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    z = columns_of(z_ptr, rows * stride_zm, 1, rows < tokens, LEFT)
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, columns, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        inside = (rows[:, None] < tokens) & (offs_n[None, :] < columns)
        u = tl.load(u_ptr + rows[:, None] * stride_um + offs_n[None, :], inside, other=0.0)
        wide = u.to(tl.float32)
        if LEFT > 0:
            b = columns_of(b_ptr, offs_n * LEFT, 1, offs_n < columns, LEFT)
            wide = updated(wide, z, b, scaling, LEFT)
        # With a mask Triton does not compute g a second time, as an operand of the product.
        share, _ = normal(wide)
        g = tl.where(inside, wide * share, 0.0).to(u.dtype)
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
    z_ptr,
    b_ptr,
    dz_part_ptr,
    db_part_ptr,
    tokens,
    columns,
    ranks,
    b_ranks,
    chunk_rows,
    stride_dm,
    stride_um,
    stride_hm,
    stride_zm,
    scaling,
    LOW: tl.constexpr,
    WANT: tl.constexpr,
    NEED_DA: tl.constexpr,
    UP: tl.constexpr,
    NEED_DB: tl.constexpr,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANKS: tl.constexpr = 0,
):
    """du = (dg + dh A) (Φ(u) + u φ(u)) in dg's place, g = gelu(u), and partials (chunks, R, D) of
    dA = dhᵀ g; one program per chunk of rows and block of columns.

    UP: also partials of what the layer before makes of du as it is stored: dz = s · du B, each of
    a block of columns (blocks, tokens, r), and dB = s · duᵀ z, each of a chunk (chunks, D, r).
    LEFT: columns of z, where scaling · z Bᵀ is yet to be added to u; else 0
    RANKS: R where it is so small that multiply-adds cost dh A less than a tensor core's layout
    costs what follows, which then is made twice. Else 0.
    """
    chunk = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    a_inside = (offs_r[:, None] < ranks) & (offs_n[None, :] < columns)
    a_at = offs_r[:, None] * columns + offs_n[None, :]
    factors = ()
    for r in tl.static_range(RANKS):
        a_r = tl.load(a_ptr + r * columns + offs_n, offs_n < columns, other=0.0)
        factors += (a_r.to(dh_ptr.dtype.element_ty).to(tl.float32),)
    if LOW and RANKS == 0:
        a = tl.load(a_ptr + a_at, a_inside, other=0.0).to(dh_ptr.dtype.element_ty)  # (R, N)
    if UP:
        b_inside = (offs_n[:, None] < columns) & (offs_r[None, :] < b_ranks)
        b_at = offs_n[:, None] * b_ranks + offs_r[None, :]
        b = tl.load(b_ptr + b_at, b_inside, other=0.0).to(dg_ptr.dtype.element_ty)  # (N, R)
    left_b = columns_of(b_ptr, offs_n * LEFT, 1, offs_n < columns, LEFT)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    acc_b = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in range(0, chunk_rows, BLOCK_M):
        rows = chunk * chunk_rows + first + tl.arange(0, BLOCK_M)
        live = rows[:, None] < tokens
        inside = live & (offs_n[None, :] < columns)
        dg_at = dg_ptr + rows[:, None] * stride_dm + offs_n[None, :]
        dg = tl.load(dg_at, inside, other=0.0)
        u = tl.load(u_ptr + rows[:, None] * stride_um + offs_n[None, :], inside, other=0.0)
        d, wide = dg.to(tl.float32), u.to(tl.float32)
        if LEFT > 0:
            z_columns = columns_of(z_ptr, rows * stride_zm, 1, rows < tokens, LEFT)
            wide = updated(wide, z_columns, left_b, scaling, LEFT)
        if LOW:
            dh_at = dh_ptr + rows[:, None] * stride_hm + offs_r[None, :]
            dh_inside = live & (offs_r[None, :] < ranks)
        for r in tl.static_range(RANKS):
            dh_r = tl.load(dh_ptr + rows * stride_hm + r, rows < tokens, other=0.0)
            d += dh_r.to(tl.float32)[:, None] * factors[r][None, :]
        if LOW and RANKS == 0:
            dh = tl.load(dh_at, dh_inside, other=0.0)  # (BLOCK_M, BLOCK_R)
            d += tl.dot(dh, a, input_precision=PRECISION)
        share, bell = normal(wide)
        slope = share + wide * bell * 0.3989422804014327  # 1/√(2π)
        # With a mask Triton does not compute du and g a second time, as operands of products.
        du = d * slope
        if UP:
            du = tl.where(inside, du, 0.0)
        du = du.to(dg.dtype)
        tl.store(dg_at, du, inside)
        if UP:
            low = live & (offs_r[None, :] < b_ranks)
            dz = tl.dot(du, b, input_precision=PRECISION) * scaling  # (BLOCK_M, BLOCK_R)
            dz_row = (tl.program_id(1).to(tl.int64) * tokens + rows[:, None]) * b_ranks
            tl.store(dz_part_ptr + dz_row + offs_r[None, :], dz, low)
        if NEED_DB:
            z = tl.load(z_ptr + rows[:, None] * stride_zm + offs_r[None, :], low, other=0.0)
            acc_b += tl.dot(tl.trans(z), du, input_precision=PRECISION)  # (BLOCK_R, BLOCK_N)
        if WANT or NEED_DA:
            g = tl.where(inside, wide * share, 0.0).to(dg.dtype)
        if WANT:
            tl.store(g_ptr + rows[:, None] * columns + offs_n[None, :], g, inside)
        if NEED_DA:
            if RANKS > 0:
                dh = tl.load(dh_at, dh_inside, other=0.0)
            acc += tl.dot(tl.trans(dh), g, input_precision=PRECISION)  # (BLOCK_R, BLOCK_N)
    if NEED_DA:
        tl.store(da_part_ptr + chunk * ranks * columns + a_at, acc, a_inside)
    if NEED_DB:
        db_inside = (offs_r[:, None] < b_ranks) & (offs_n[None, :] < columns)
        db_at = chunk * columns * b_ranks + offs_n[None, :] * b_ranks + offs_r[:, None]
        tl.store(db_part_ptr + db_at, acc_b * scaling, db_inside)
