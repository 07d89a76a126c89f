# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the forward, and how the bias enters them and the backward's.

A program holds queries of one head of one window. Positions of windows, their padding and the way
back are index arithmetic. The bias enters as the factors rel_h[i, a] = q_i · table_h[y_i − a] and
rel_w[i, b] = q_i · table_w[x_i − b], in one of two ways:

rows      keys of a tile lie in one line a of the map: the bias is a column of rel_h and a tile of
          rel_w that serves every line. The factors are made by their own launch. For wide maps.
one-hot   keys run through the window: rel_h and rel_w times tiles that are one at the line and at
          the column of each key. The factors are made in place. For windows of at most 16 by 16.

Without a bias (REL = 0) there are no factors. Keys run through the window as with one-hot. If the
window is a map whose tokens lie as one line, they run as one line.

Derivations, bytes and launches are in this folder's README.
"""

import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.relpos_attention import costs
from samfast.kernels.relpos_attention.triton_places import (
    GIVEN_PADS,
    LOG2E,
    dot_nt,
    key_places,
    keys_inside,
    load_head,
    load_keys,
    load_rows,
    pixels,
    place,
    positions,
    power,
    queries,
    start_of,
    store_head,
)
from samfast.kernels.relpos_attention.triton_small import (
    small_bias,
    small_factors,
)


@triton.jit
def table_rows(table_ptr, first, size, q, HEAD: tl.constexpr, HEAD_A: tl.constexpr,
               HEAD_B: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """BLOCK_T rows of a table read backwards, as q's dtype, and their numbers u.

    Query i meets row u of the reversed table at key u + i − (size − 1).
    """
    u = first + tl.arange(0, BLOCK_T)
    at, known = table_ptr + (2 * size - 2 - u) * HEAD, (u >= 0) & (u < 2 * size - 1)
    t = load_rows(at, known, 0, HEAD_A, HEAD, True).to(q.dtype)
    t_rest = load_rows(at, known, HEAD_A, HEAD_B, HEAD, True).to(q.dtype) if HEAD_B else t
    return u, t, t_rest


@triton.jit
def write_factor(q, q_rest, table_ptr, rel_ptr, row, step, at, live, size, limit, start, stop, less,
                 HEAD: tl.constexpr, HEAD_A: tl.constexpr, HEAD_B: tl.constexpr,
                 BLOCK_T: tl.constexpr, UNIT: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """q_i · table[at_i − key + size − 1] to rel_ptr + row_i + step · key; zeros from size to limit.

    The product with all rows of the table is stored along its diagonals.
    start, stop: rows of the reversed table that these queries meet
    less: None, or what each row's products are stored without, after they were rounded and
        multiplied by UNIT
    """
    for first in tl.range(start, stop, BLOCK_T, num_stages=1):
        u, t, t_rest = table_rows(table_ptr, first, size, q, HEAD, HEAD_A, HEAD_B, BLOCK_T)
        g = dot_nt(q, q_rest, t, t_rest, HEAD_B, PRECISION)  # (BLOCK_M, BLOCK_T)
        key = u[None, :] + at[:, None] - (size - 1)
        g = tl.where(key < size, g, 0.0).to(q.dtype)
        if less is not None:
            g = g.to(tl.float32) * UNIT - less[:, None]
        mask = live[:, None] & (key >= 0) & (key < limit)
        tl.store(rel_ptr + (row[:, None] + key * step), g, mask)


@triton.jit
def lines_met(first, height, lines, columns, BLOCK_M: tl.constexpr):
    """start and stop of the rows of the reversed table of lines that BLOCK_M queries meet."""
    last = tl.minimum(first + BLOCK_M, lines * columns) - 1
    return height - 1 - last // columns, 2 * height - 1 - first // columns


@triton.jit(launch_metadata=launched(__package__, costs.prepare_kernel, "q_ptr"))
def prepare_kernel(
    q_ptr,
    table_h_ptr,
    table_w_ptr,
    rel_h_ptr,
    rel_w_ptr,
    lse_ptr,
    stride_qb,
    stride_qy,
    stride_qx,
    stride_qn,
    heads,
    height,
    width,
    image_height,
    image_width,
    down,
    across,
    tiles,
    rel,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The factors by rows: rel_h (batch, heads, height, tokens), rel_w (batch, heads, tokens, rel).

    With lse, for the backward, rel_h is float32: rel_h less lse, as the exponents take it.
    """
    tile, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    image, head, top, left, lines, columns = place(
        group, heads, height, width, image_height, image_width, down, across
    )
    if tile * BLOCK_M >= lines * columns:
        return
    live, y, x = queries(tile * BLOCK_M, top, left, lines, columns, False, False, FULL, BLOCK_M)
    tokens = image_height * image_width
    token = y * image_width + x
    plane = image.to(tl.int64) * heads + head
    q_at = start_of(q_ptr, image, head, stride_qb, stride_qn)
    q_at = pixels(q_at, y, x, stride_qy, stride_qx, WIDE)
    q, q_rest = load_head(q_at, live, HEAD, HEAD_A, HEAD_B, True)

    UNIT: tl.constexpr = 1.0 if NATURAL else LOG2E
    less = None
    if lse_ptr is not None:
        less = tl.load(lse_ptr + plane * tokens + token, live, other=0.0) * UNIT
    start, stop = lines_met(tile * BLOCK_M, height, lines, columns, BLOCK_M)
    rel_h_ptr += plane * height * tokens
    rel_w_ptr += plane * tokens * rel
    write_factor(
        q, q_rest, table_h_ptr, rel_h_ptr, token, tokens, y - top, live, height, height, start,
        stop, less, HEAD, HEAD_A, HEAD_B, BLOCK_T, UNIT, PRECISION,
    )  # fmt: skip
    write_factor(
        q, q_rest, table_w_ptr, rel_w_ptr, token * rel, 1, x - left, live, width, width,
        width - columns, 2 * width - 1, None, HEAD, HEAD_A, HEAD_B, BLOCK_T, UNIT, PRECISION,
    )  # fmt: skip


@triton.jit
def attend(lines, most, total, acc, acc_rest, MORE: tl.constexpr, NATURAL: tl.constexpr,
           HEAD_B: tl.constexpr, LINES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """LINES tiles of keys of the running softmax.

    lines: of each its logits s (BLOCK_M, BLOCK_N) and column (BLOCK_M), which add up, v and v_rest
    MORE: what turns logits into exponents
    """
    new = most
    for i in tl.static_range(LINES):
        new = tl.maximum(new, tl.max(lines[i][0], 1) + lines[i][1])
    weights = ()
    for i in tl.static_range(LINES):
        s, column, v, v_rest = lines[i]
        weights += (power(s * MORE - ((new - column) * MORE)[:, None], NATURAL),)
    shrink = power((most - new) * MORE, NATURAL)
    added = weights[0]
    for i in tl.static_range(1, LINES):
        added += weights[i]
    total = total * shrink + tl.sum(added, 1)
    acc *= shrink[:, None]
    if HEAD_B:
        acc_rest *= shrink[:, None]
    for i in tl.static_range(LINES):
        s, column, v, v_rest = lines[i]
        p = weights[i].to(v.dtype)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
        if HEAD_B:
            acc_rest = tl.dot(p, v_rest, acc_rest, input_precision=PRECISION)
    return new, total, acc, acc_rest


@triton.jit
def moment(s, column, dout, dout_rest, v, v_rest, lse, weight, total, MORE: tl.constexpr,
           NATURAL: tl.constexpr, HEAD_B: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys of Σ P and Σ P · (dout vᵀ); as for attend."""
    p = power(s * MORE - (lse - column * MORE)[:, None], NATURAL)
    dp = dot_nt(dout, dout_rest, v, v_rest, HEAD_B, PRECISION)
    return weight + tl.sum(p, 1), total + tl.sum(p * dp, 1)


@triton.jit(launch_metadata=launched(__package__, costs.forward_kernel, "q_ptr"))
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    pad_k_ptr,
    pad_v_ptr,
    table_h_ptr,
    table_w_ptr,
    rel_h_ptr,
    rel_w_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    share_ptr,
    stride_qb,
    stride_qy,
    stride_qx,
    stride_qn,
    stride_kb,
    stride_ky,
    stride_kx,
    stride_kn,
    stride_vb,
    stride_vy,
    stride_vx,
    stride_vn,
    stride_pkb,
    stride_pkp,
    stride_pkn,
    stride_pvb,
    stride_pvp,
    stride_pvn,
    stride_gb,
    stride_gy,
    stride_gx,
    stride_gn,
    heads,
    height,
    width,
    image_height,
    image_width,
    down,
    across,
    tiles,
    rel,
    scale,
    ONE_HOT: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
    PADS: tl.constexpr,
    NATURAL: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    REL: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINES: tl.constexpr,
):
    """out (batch, H, W, heads, head_dim) and lse (batch, heads, H · W).

    Where dout is given, from lse, delta = Σ P · (dout vᵀ) / Σ P and share = 1 / Σ P instead:
    what lse and out were rounded to would leave gradients less exact than float32 should be.
    rel_h by rows is then less lse.

    NATURAL: logits are kept for base e, not two
    EVEN: tiles of keys are full and all of them are loaded
    REL: columns of rel_h and of rel_w with ONE_HOT; 0 without a bias, which goes with ONE_HOT
    HEIGHT, WIDTH, PITCH: the window's size and how many positions a line of keys takes, where
        ONE_HOT has a bias, which table_h and table_w give; else 0, and rel_h and rel_w give it
    LINES: lines of keys a turn by rows; they divide the height
    """
    LINE: tl.constexpr = FLAT and REL == 0
    if HEIGHT:
        height, width = HEIGHT, WIDTH
    tile, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    image, head, top, left, lines, columns = place(
        group, heads, height, width, image_height, image_width, down, across
    )
    if tile * BLOCK_M >= positions(lines, columns, PITCH > 0):
        return
    live, y, x = queries(tile * BLOCK_M, top, left, lines, columns, PITCH > 0, FLAT, FULL, BLOCK_M)
    tokens = image_height * image_width
    token = y * image_width + x
    plane = image.to(tl.int64) * heads + head
    q_at = start_of(q_ptr, image, head, stride_qb, stride_qn)
    q_at = pixels(q_at, y, x, stride_qy, stride_qx, WIDE)
    q, q_rest = load_head(q_at, live, HEAD, HEAD_A, HEAD_B, True)
    k_ptr = start_of(k_ptr, image, head, stride_kb, stride_kn)
    v_ptr = start_of(v_ptr, image, head, stride_vb, stride_vn)
    if PADS == GIVEN_PADS:
        pad_k_ptr = start_of(pad_k_ptr, image, head, stride_pkb, stride_pkn)
        pad_v_ptr = start_of(pad_v_ptr, image, head, stride_pvb, stride_pvn)

    UNIT: tl.constexpr = 1.0 if NATURAL else LOG2E
    if dout_ptr is not None:
        g_at = start_of(dout_ptr, image, head, stride_gb, stride_gn)
        g_at = pixels(g_at, y, x, stride_gy, stride_gx, WIDE)
        dout, dout_rest = load_head(g_at, live, HEAD, HEAD_A, HEAD_B, True)
        if ONE_HOT:
            lse = tl.load(lse_ptr + plane * tokens + token, live, other=0.0) * UNIT
        weight = tl.zeros((BLOCK_M,), tl.float32)

    REST: tl.constexpr = HEAD_B if HEAD_B else 16
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_A), tl.float32)
    acc_rest = tl.zeros((BLOCK_M, REST), tl.float32)
    # Factors of small windows are of base two, as the logits are, but where float16 may overflow.
    LATE: tl.constexpr = (PITCH > 0) and (q_ptr.dtype.element_ty == tl.float16)
    BASE: tl.constexpr = 1.0 if LATE else UNIT
    MORE: tl.constexpr = UNIT if LATE else 1.0
    if ONE_HOT:
        if REL:
            rel_h, rel_w = small_factors(
                q, q_rest, table_h_ptr, table_w_ptr, y - top, x - left, lines, columns, BASE,
                HEIGHT, WIDTH, HEAD, HEAD_A, HEAD_B, REL, PRECISION,
            )  # fmt: skip
        for first in range(0, height * (PITCH if PITCH else width), BLOCK_N):
            a, b, valid = key_places(first, height, width, BLOCK_N, PITCH, LINE)
            key_y, key_x = top + a, left + b
            inside = keys_inside(key_y, key_x, valid, image_height, image_width, LINE)
            k, k_rest = load_keys(
                k_ptr, pad_k_ptr, key_y, key_x, inside, valid, stride_ky, stride_kx, stride_pkp,
                image_height, image_width, width, across, PADS, WIDE, EVEN, HEAD, HEAD_A, HEAD_B,
            )  # fmt: skip
            s = dot_nt(q, q_rest, k, k_rest, HEAD_B, PRECISION)  # (BLOCK_M, BLOCK_N)
            s = s * (scale * BASE)
            if REL:
                s, _, _ = small_bias(s, rel_h, rel_w, a, b, valid, REL, PRECISION)
            if not EVEN:
                s = tl.where(valid[None, :], s, float("-inf"))
            v, v_rest = load_keys(
                v_ptr, pad_v_ptr, key_y, key_x, inside, valid, stride_vy, stride_vx, stride_pvp,
                image_height, image_width, width, across, PADS, WIDE, EVEN, HEAD, HEAD_A, HEAD_B,
            )  # fmt: skip
            if dout_ptr is None:
                most, total, acc, acc_rest = attend(
                    ((s, 0.0, v, v_rest),), most, total, acc, acc_rest, MORE, NATURAL, HEAD_B, 1,
                    PRECISION,
                )  # fmt: skip
            else:
                weight, total = moment(
                    s, 0.0, dout, dout_rest, v, v_rest, lse, weight, total, MORE, NATURAL, HEAD_B,
                    PRECISION,
                )  # fmt: skip
    else:
        rel_h_ptr += plane * height * tokens
        rel_w_ptr += plane * tokens * rel
        for first in range(0, width, BLOCK_N):
            b = first + tl.arange(0, BLOCK_N)
            key_x, valid = left + b, b < width
            w_at = rel_w_ptr + (token[:, None] * rel + b[None, :])
            tile_w = tl.load(w_at, live[:, None] & valid[None, :], other=0.0).to(tl.float32) * UNIT
            if not EVEN:
                tile_w = tl.where(valid[None, :], tile_w, float("-inf"))  # (BLOCK_M, BLOCK_N)
            ahead = ()
            for i in tl.static_range(LINES):
                ahead += (tl.load(rel_h_ptr + i * tokens + token, live, other=0.0),)
            for first_line in range(0, height, LINES):
                tiles_met, following = (), ()
                for i in tl.static_range(LINES):
                    a = first_line + i
                    column = ahead[i].to(tl.float32)
                    if dout_ptr is None:
                        column *= UNIT
                    after = tl.minimum(a + LINES, height - 1)
                    following += (tl.load(rel_h_ptr + after * tokens + token, live, other=0.0),)
                    key_y = tl.zeros_like(b) + top + a
                    inside = valid & (key_y < image_height) & (key_x < image_width)
                    k, k_rest = load_keys(
                        k_ptr, pad_k_ptr, key_y, key_x, inside, valid, stride_ky, stride_kx,
                        stride_pkp, image_height, image_width, width, across, PADS, WIDE, EVEN,
                        HEAD, HEAD_A, HEAD_B,
                    )  # fmt: skip
                    s = dot_nt(q, q_rest, k, k_rest, HEAD_B, PRECISION)  # (BLOCK_M, BLOCK_N)
                    s = s * (scale * UNIT) + tile_w
                    v, v_rest = load_keys(
                        v_ptr, pad_v_ptr, key_y, key_x, inside, valid, stride_vy, stride_vx,
                        stride_pvp, image_height, image_width, width, across, PADS, WIDE, EVEN,
                        HEAD, HEAD_A, HEAD_B,
                    )  # fmt: skip
                    tiles_met += ((s, column, v, v_rest),)
                ahead = following
                if dout_ptr is None:
                    most, total, acc, acc_rest = attend(
                        tiles_met, most, total, acc, acc_rest, MORE, NATURAL, HEAD_B, LINES,
                        PRECISION,
                    )  # fmt: skip
                else:  # the column is already less lse
                    weight, total = moment(
                        s, column, dout, dout_rest, v, v_rest, 0.0, weight, total, MORE, NATURAL,
                        HEAD_B, PRECISION,
                    )  # fmt: skip

    if dout_ptr is None:
        tl.store(lse_ptr + plane * tokens + token, most / BASE + tl.log(total), live)
        out_at = out_ptr + (image.to(tl.int64) * tokens * heads + head) * HEAD
        out_at = pixels(out_at, token * 0, token, 0, heads * HEAD, WIDE)
        if NATURAL:
            acc, acc_rest = acc / total[:, None], acc_rest / total[:, None]
        else:  # a product an element, which 16 bits do not tell from a division
            share = (1.0 / total)[:, None]
            acc, acc_rest = acc * share, acc_rest * share
        store_head(out_at, acc, acc_rest, live, HEAD, HEAD_A, HEAD_B)
    else:
        tl.store(delta_ptr + plane * tokens + token, total / weight, live)
        tl.store(share_ptr + plane * tokens + token, 1.0 / weight, live)
