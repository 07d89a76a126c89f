# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of rows that stay in registers, and sums of rows with an adapter's update.

A program walks a row once and keeps its chunks of BLOCK_N columns. Ranks are low enough for
multiply-adds. Rows beyond the last are the last one again, and are not stored. FULL says that
BLOCK_N divides the columns, so that no load has a mask.
"""

import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.sam_block import costs


@triton.jit
def load_row(ptr, offs, columns, FULL: tl.constexpr):
    """Elements offs of a row from ptr on, zeros beyond its columns."""
    return tl.load(ptr + offs) if FULL else tl.load(ptr + offs, offs < columns, other=0.0)


@triton.jit
def beside(value, offs, columns, FULL: tl.constexpr):
    """value, zeros beyond the columns."""
    return value if FULL else tl.where(offs < columns, value, 0.0)


@triton.jit
def stored(live, offs, columns, FULL: tl.constexpr):
    """Which elements of live rows are stored."""
    return live if FULL else live & (offs < columns)


@triton.jit(launch_metadata=launched(__package__, costs.norm_row_kernel, "n_ptr"))
def norm_row_kernel(
    x_ptr,
    update_ptr,
    z_ptr,
    b_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
    total_ptr,
    n_ptr,
    h_ptr,
    tokens,
    columns,
    stride_xm,
    stride_um,
    stride_zm,
    stride_nm,
    scaling,
    eps,
    ADD: tl.constexpr,
    UP: tl.constexpr,
    RANKS: tl.constexpr,
    ROOM: tl.constexpr,
    FULL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """n = LayerNorm(x), or of total = x + update + scaling z B, which is stored; h = n Aᵀ.

    A warp has a row.   b_ptr: (UP, columns)   a_ptr: (RANKS, columns)
    ROOM: columns behind n's, which also get h, and then zeros
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    live = rows < tokens
    rows = tl.minimum(rows, tokens - 1)
    # Of a place for each row, so that what all rows share is loaded where it is used.
    lanes = tl.arange(0, BLOCK_N)[None, :] + tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    kept = ()
    for c in tl.static_range(CHUNKS):
        kept += (load_row(x_ptr + rows * stride_xm, c * BLOCK_N + lanes, columns, FULL),)
    if ADD:
        updates = ()
        for c in tl.static_range(CHUNKS):
            offs = c * BLOCK_N + lanes
            updates += (load_row(update_ptr + rows * stride_um, offs, columns, FULL),)
        low = ()
        for k in tl.static_range(UP):
            low += (tl.load(z_ptr + rows * stride_zm + k).to(tl.float32) * scaling,)
        totals = ()
        for c in tl.static_range(CHUNKS):
            offs = c * BLOCK_N + lanes
            update = updates[c].to(tl.float32)
            for k in tl.static_range(UP):
                b = load_row(b_ptr + k * columns, offs, columns, FULL)
                update += low[k] * b.to(tl.float32)
            total = (kept[c].to(tl.float32) + update).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + rows * columns + offs, total, stored(live, offs, columns, FULL))
            totals += (total,)
        kept = totals
    # Statistics of x less the row's first element, which loses no digits.
    pivot = tl.sum(tl.where(lanes == 0, kept[0].to(tl.float32), 0.0), 1)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in tl.static_range(CHUNKS):
        total += beside(kept[c].to(tl.float32) - pivot, c * BLOCK_N + lanes, columns, FULL)
    mean = tl.sum(total, 1)[:, None] / columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in tl.static_range(CHUNKS):
        apart = kept[c].to(tl.float32) - pivot - mean
        apart = beside(apart, c * BLOCK_N + lanes, columns, FULL)
        total += apart * apart
    rstd = tl.rsqrt(tl.sum(total, 1)[:, None] / columns + eps)
    made = ()
    for c in tl.static_range(CHUNKS):
        offs = c * BLOCK_N + lanes
        weight = load_row(weight_ptr, offs, columns, FULL).to(tl.float32)
        bias = load_row(bias_ptr, offs, columns, FULL).to(tl.float32)
        n = (kept[c].to(tl.float32) - pivot - mean) * rstd
        n = (n * weight + bias).to(n_ptr.dtype.element_ty)
        tl.store(n_ptr + rows * stride_nm + offs, n, stored(live, offs, columns, FULL))
        made += (n,)
    behind = n_ptr + rows * stride_nm + columns
    for k in tl.static_range(RANKS, ROOM):
        tl.store(behind + k, tl.zeros((BLOCK_M, 1), n_ptr.dtype.element_ty), live)
    for k in tl.static_range(RANKS):
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in tl.static_range(CHUNKS):
            a = load_row(a_ptr + k * columns, c * BLOCK_N + lanes, columns, FULL)
            n = beside(made[c].to(tl.float32), c * BLOCK_N + lanes, columns, FULL)
            total += n * a.to(tl.float32)
        h = tl.sum(total, 1)[:, None]
        tl.store(h_ptr + rows * RANKS + k, h.to(h_ptr.dtype.element_ty), live)
        if ROOM:
            tl.store(behind + k, h.to(n_ptr.dtype.element_ty), live)


@triton.jit
def fetch(
    dn_ptr, x_ptr, residual_ptr, dh_ptr, first, end, columns, stride_dm, stride_xm, stride_rm,
    stride_hm, RANKS: tl.constexpr, FULL: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Read BLOCK_M rows. A row gives its first element, chunks of x, dn and residual, and dh.

    Rows from ``end`` on are the last one, with a dh of zero.
    """
    lanes = tl.arange(0, BLOCK_N)
    found = ()
    for i in tl.static_range(BLOCK_M):
        row = tl.minimum(first + i, end - 1)
        x, d, residual, dh = (), (), (), ()
        for c in tl.static_range(CHUNKS):
            offs = c * BLOCK_N + lanes
            x += (load_row(x_ptr + row * stride_xm, offs, columns, FULL),)
            d += (load_row(dn_ptr + row * stride_dm, offs, columns, FULL),)
            residual += (load_row(residual_ptr + row * stride_rm, offs, columns, FULL),)
        for k in tl.static_range(RANKS):
            of_rank = tl.load(dh_ptr + row * stride_hm + k).to(tl.float32)
            dh += (tl.where(first + i < end, of_rank, 0.0),)
        found += ((tl.load(x_ptr + row * stride_xm), x, d, residual, dh),)
    return found


@triton.jit
def sums_of_two(a, b, c, d, e, f):
    """The sums of six vectors, by one reduction."""
    three, others = tl.join(tl.join(a, b), tl.join(c, c)), tl.join(tl.join(d, e), tl.join(f, f))
    first, second = tl.split(tl.sum(tl.join(three, others), 0))  # joined last, split first
    ab, cc = tl.split(first)
    de, ff = tl.split(second)
    a, b = tl.split(ab)
    d, e = tl.split(de)
    c, c = tl.split(cc)
    f, f = tl.split(ff)
    return (a, b, c), (d, e, f)


@triton.jit(launch_metadata=launched(__package__, costs.norm_row_backward_kernel, "dn_ptr"))
def norm_row_backward_kernel(
    dn_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    dh_ptr,
    a_ptr,
    dx_ptr,
    n_ptr,
    da_part_ptr,
    tokens,
    columns,
    chunk_rows,
    stride_dm,
    stride_xm,
    stride_rm,
    stride_hm,
    eps,
    RANKS: tl.constexpr,
    NEED_DA: tl.constexpr,
    WANT: tl.constexpr,
    AHEAD: tl.constexpr,
    FULL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = residual + the gradient of n = LayerNorm(x), dn + dh A, sent through it, and partials
    (programs, RANKS, columns) of dA = dhᵀ n; n may be dn and has its strides.

    A program walks chunk_rows rows, BLOCK_M at a time, an even number. Its threads share a row's
    columns and keep theirs, so that dA adds up where its elements are.
    AHEAD: whether a turn asks for the next turn's rows before it works
    """
    lanes = tl.arange(0, BLOCK_N)
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * chunk_rows
    end = tl.minimum(start + chunk_rows, tokens)
    weights, biases, sums = (), (), ()
    for c in tl.static_range(CHUNKS):
        offs = c * BLOCK_N + lanes
        weights += (load_row(weight_ptr, offs, columns, FULL).to(tl.float32),)
        if WANT or NEED_DA:
            biases += (load_row(bias_ptr, offs, columns, FULL).to(tl.float32),)
        for _k in tl.static_range(RANKS if NEED_DA else 0):
            sums += (tl.zeros((BLOCK_N,), tl.float32),)
    following = ()
    if AHEAD:
        following = fetch(
            dn_ptr, x_ptr, residual_ptr, dh_ptr, start, end, columns, stride_dm, stride_xm,
            stride_rm, stride_hm, RANKS, FULL, CHUNKS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for turn in range(0, chunk_rows, BLOCK_M):
        if AHEAD:
            rows = following
        ahead = start + turn + (BLOCK_M if AHEAD else 0)
        fetched = fetch(
            dn_ptr, x_ptr, residual_ptr, dh_ptr, ahead, end, columns, stride_dm, stride_xm,
            stride_rm, stride_hm, RANKS, FULL, CHUNKS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if AHEAD:
            following = fetched
        else:
            rows = fetched
        shifted, grown, of_rows = (), (), ()
        for i in tl.static_range(BLOCK_M):
            first, x, d, residual, dh = rows[i]
            pivot = first.to(tl.float32)
            sum_s = tl.zeros((BLOCK_N,), tl.float32)
            sum_g = tl.zeros((BLOCK_N,), tl.float32)
            sum_gs = tl.zeros((BLOCK_N,), tl.float32)
            s_row, g_row = (), ()
            for c in tl.static_range(CHUNKS):
                offs = c * BLOCK_N + lanes
                s = beside(x[c].to(tl.float32) - pivot, offs, columns, FULL)
                g = d[c].to(tl.float32)
                for k in tl.static_range(RANKS):
                    a = load_row(a_ptr + k * columns, offs, columns, FULL)
                    g += dh[k] * a.to(tl.float32)
                g = g * weights[c]
                sum_s += s
                sum_g += g
                sum_gs += g * s
                s_row += (s,)
                g_row += (g,)
            shifted += (s_row,)
            grown += (g_row,)
            of_rows += ((sum_s, sum_g, sum_gs),)
        summed = ()
        for i in tl.static_range(0, BLOCK_M, 2):
            s0, g0, gs0 = of_rows[i]
            s1, g1, gs1 = of_rows[i + 1]
            summed += sums_of_two(s0, g0, gs0, s1, g1, gs1)
        of_rows = summed
        spreads = ()
        for i in tl.static_range(BLOCK_M):
            mean = of_rows[i][0] / columns
            spread = tl.zeros((BLOCK_N,), tl.float32)
            for c in tl.static_range(CHUNKS):
                apart = beside(shifted[i][c] - mean, c * BLOCK_N + lanes, columns, FULL)
                spread += apart * apart
            spreads += (spread,)
        summed = ()
        for i in tl.static_range(0, BLOCK_M, 2):
            summed += tl.split(tl.sum(tl.join(spreads[i], spreads[i + 1]), 0))
        spreads = summed
        if WANT:
            n_at = n_ptr + (start + turn) * stride_dm
            tl.debug_barrier()  # no thread stores over a dn that another has yet to load
        for i in tl.static_range(BLOCK_M):
            row = start + turn + i
            first, x, d, residual, dh = rows[i]
            sum_s, sum_g, sum_gs = of_rows[i]
            mean = sum_s / columns
            rstd = tl.rsqrt(spreads[i] / columns + eps)
            mean_g = sum_g / columns
            mean_gn = (sum_gs - mean * sum_g) * rstd / columns  # of g times the normalised x
            added = ()
            for c in tl.static_range(CHUNKS):
                offs = c * BLOCK_N + lanes
                inside = offs < tl.where(row < end, columns, 0)
                n = (shifted[i][c] - mean) * rstd
                dx = (grown[i][c] - mean_g - n * mean_gn) * rstd + residual[c].to(tl.float32)
                tl.store(dx_ptr + row * columns + offs, dx.to(dx_ptr.dtype.element_ty), inside)
                if WANT or NEED_DA:
                    n = n * weights[c] + biases[c]
                if WANT:
                    tl.store(n_at + offs, n.to(n_ptr.dtype.element_ty), inside)
                if NEED_DA:
                    for k in tl.static_range(RANKS):
                        added += (sums[c * RANKS + k] + dh[k] * n,)
            if WANT:
                n_at += stride_dm
            if NEED_DA:
                sums = added
    if NEED_DA:
        for c in tl.static_range(CHUNKS):
            offs = c * BLOCK_N + lanes
            for k in tl.static_range(RANKS):
                at = da_part_ptr + (chunk * RANKS + k) * columns + offs
                tl.store(at, sums[c * RANKS + k], offs < columns)


@triton.jit(launch_metadata=launched(__package__, costs.add_row_kernel, "z_ptr"))
def add_row_kernel(
    x_ptr,
    update_ptr,
    z_ptr,
    b_ptr,
    y_ptr,
    tokens,
    columns,
    stride_xm,
    stride_um,
    stride_zm,
    scaling,
    UP: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = x + update + scaling z B, which may be update; one program a tile. b_ptr (UP, columns)"""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    factors, given = (), ()
    for k in tl.static_range(UP):
        b = load_row(b_ptr + k * columns, offs, columns, FULL)
        factors += (b.to(tl.float32) * scaling,)
    for i in tl.static_range(BLOCK_M):
        row = tl.minimum(first + i, tokens - 1)
        x = load_row(x_ptr + row * stride_xm, offs, columns, FULL)
        given += ((x, load_row(update_ptr + row * stride_um, offs, columns, FULL)),)
    for i in tl.static_range(BLOCK_M):
        row = tl.minimum(first + i, tokens - 1)
        x, update = given[i]
        update = update.to(tl.float32)
        for k in tl.static_range(UP):
            update += tl.load(z_ptr + row * stride_zm + k).to(tl.float32) * factors[k]
        y = (x.to(tl.float32) + update).to(y_ptr.dtype.element_ty)
        inside = offs < tl.where(first + i < tokens, columns, 0)
        tl.store(y_ptr + row * columns + offs, y, inside)
