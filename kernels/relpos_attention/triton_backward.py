# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the backward; the ways in which the bias enters are those of the forward.

With P the weights and dP = dout vᵀ, dS = P · (dP − delta) is the gradient of the logits. dq, dk and
dv are products with it, the gradients of the factors its sums over lines and over columns. With
one-hot tiles dq makes the factors again and leaves them for dk and dv. In 16 bits dq makes delta
on its way.
"""

import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.relpos_attention import costs
from samfast.kernels.relpos_attention.triton_forward import (
    lines_met,
    table_rows,
)
from samfast.kernels.relpos_attention.triton_places import (
    GIVEN_PADS,
    LOG2E,
    dot_nt,
    further,
    key_places,
    key_rows,
    keys_inside,
    load_head,
    load_keys,
    load_rows,
    pixels,
    place,
    positions,
    power,
    queries,
    shift_of,
    small_places,
    start_of,
    store_head,
)
from samfast.kernels.relpos_attention.triton_small import (
    add_small_gradient,
    one_hot,
    small_bias,
    small_factors,
)
from samfast.kernels.relpos_attention.triton_tables import skewed


@triton.jit
def add_factor_gradient(dq, dq_rest, table_ptr, drel_ptr, row, step, at, live, size, start, stop,
                        kind: tl.constexpr, HEAD: tl.constexpr, HEAD_A: tl.constexpr,
                        HEAD_B: tl.constexpr, BLOCK_T: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    """dq plus what one factor's gradient gives, (BLOCK_M, HEAD_A) and (BLOCK_M, HEAD_B)."""
    for first in tl.range(start, stop, BLOCK_T, num_stages=1):
        u = first + tl.arange(0, BLOCK_T)
        d = skewed(drel_ptr, row, step, at, live, size, u, kind)
        _, t, t_rest = table_rows(table_ptr, first, size, d, HEAD, HEAD_A, HEAD_B, BLOCK_T)
        dq = tl.dot(d, t, dq, input_precision=PRECISION)
        if HEAD_B:
            dq_rest = tl.dot(d, t_rest, dq_rest, input_precision=PRECISION)
    return dq, dq_rest


@triton.jit(launch_metadata=launched(__package__, costs.dq_kernel, "q_ptr"))
def dq_kernel(
    dout_ptr,
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    pad_k_ptr,
    pad_v_ptr,
    table_h_ptr,
    table_w_ptr,
    rel_h_ptr,
    rel_w_ptr,
    lse_ptr,
    delta_ptr,
    share_ptr,
    drel_h_ptr,
    drel_w_ptr,
    dq_ptr,
    stride_gb,
    stride_gy,
    stride_gx,
    stride_gn,
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
    stride_dqb,
    stride_dqy,
    stride_dqx,
    stride_dqn,
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
    SEVERAL: tl.constexpr,
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
    BLOCK_T: tl.constexpr,
):
    """dq and the gradients of the factors, which lie as the factors do.

    ONE_HOT writes the factors to rel_h (batch, heads, tokens, rel), rel_h first and rel_w behind,
    and their gradients to drel_h where it is given. By rows rel_h is less lse, as prepare_kernel
    leaves it. There drel_h is float32 where SEVERAL, for sums stay there from tile to tile; else
    it has q's dtype.

    out: None where delta is given; else delta = Σ dout · out is made here, for dk and dv too
    share: what the weights that lse gives are multiplied with; None where it makes no difference
    NATURAL, EVEN, REL, HEIGHT, WIDTH, PITCH: as in the forward
    SEVERAL: more than one tile of keys makes a line of the map
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
    UNIT: tl.constexpr = 1.0 if NATURAL else LOG2E
    q_at = start_of(q_ptr, image, head, stride_qb, stride_qn)
    q_at = pixels(q_at, y, x, stride_qy, stride_qx, WIDE)
    q, q_rest = load_head(q_at, live, HEAD, HEAD_A, HEAD_B, True)
    g_at = start_of(dout_ptr, image, head, stride_gb, stride_gn)
    g_at = pixels(g_at, y, x, stride_gy, stride_gx, WIDE)
    dout, dout_rest = load_head(g_at, live, HEAD, HEAD_A, HEAD_B, True)
    if ONE_HOT:
        lse = tl.load(lse_ptr + plane * tokens + token, live, other=0.0) * UNIT
    if out_ptr is None:
        delta = tl.load(delta_ptr + plane * tokens + token, live, other=0.0)
    else:
        out_at = out_ptr + (image.to(tl.int64) * tokens * heads + head) * HEAD
        out_at = pixels(out_at, token * 0, token, 0, heads * HEAD, WIDE)
        delta = tl.sum(dout.to(tl.float32) * load_rows(out_at, live, 0, HEAD_A, HEAD, True), 1)
        if HEAD_B:
            out_rest = load_rows(out_at, live, HEAD_A, HEAD_B, HEAD, True)
            delta += tl.sum(dout_rest.to(tl.float32) * out_rest, 1)
        tl.store(delta_ptr + plane * tokens + token, delta, live)
    if share_ptr is not None:
        share = tl.load(share_ptr + plane * tokens + token, live, other=0.0)
    k_ptr = start_of(k_ptr, image, head, stride_kb, stride_kn)
    v_ptr = start_of(v_ptr, image, head, stride_vb, stride_vn)
    if PADS == GIVEN_PADS:
        pad_k_ptr = start_of(pad_k_ptr, image, head, stride_pkb, stride_pkn)
        pad_v_ptr = start_of(pad_v_ptr, image, head, stride_pvb, stride_pvn)

    REST: tl.constexpr = HEAD_B if HEAD_B else 16
    acc = tl.zeros((BLOCK_M, HEAD_A), tl.float32)
    acc_rest = tl.zeros((BLOCK_M, REST), tl.float32)
    w_plane = plane * tokens * rel
    LATE: tl.constexpr = (PITCH > 0) and (q_ptr.dtype.element_ty == tl.float16)  # as the forward
    BASE: tl.constexpr = 1.0 if LATE else UNIT
    MORE: tl.constexpr = UNIT if LATE else 1.0
    if ONE_HOT:
        if REL:
            rel_h, rel_w = small_factors(
                q, q_rest, table_h_ptr, table_w_ptr, y - top, x - left, lines, columns, BASE,
                HEIGHT, WIDTH, HEAD, HEAD_A, HEAD_B, REL, PRECISION,
            )  # fmt: skip
            rel_at = w_plane + token[:, None] * rel + tl.arange(0, REL)[None, :]
            tl.store(rel_h_ptr + rel_at, rel_h, live[:, None])
            tl.store(rel_h_ptr + rel_at + REL, rel_w, live[:, None])
            drel_h = tl.zeros((BLOCK_M, REL), tl.float32)
            drel_w = tl.zeros((BLOCK_M, REL), tl.float32)
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
                s, hot_h, hot_w = small_bias(s, rel_h, rel_w, a, b, valid, REL, PRECISION)
            if not EVEN:
                s = tl.where(valid[None, :], s, float("-inf"))
            p = power(s * MORE - lse[:, None], NATURAL)
            if share_ptr is not None:
                p *= share[:, None]
            v, v_rest = load_keys(
                v_ptr, pad_v_ptr, key_y, key_x, inside, valid, stride_vy, stride_vx, stride_pvp,
                image_height, image_width, width, across, PADS, WIDE, EVEN, HEAD, HEAD_A, HEAD_B,
            )  # fmt: skip
            dp = dot_nt(dout, dout_rest, v, v_rest, HEAD_B, PRECISION)
            ds = (p * (dp - delta[:, None])).to(q.dtype)
            acc = tl.dot(ds, k, acc, input_precision=PRECISION)
            if HEAD_B:
                acc_rest = tl.dot(ds, k_rest, acc_rest, input_precision=PRECISION)
            if REL:
                drel_h = tl.dot(ds, hot_h, drel_h, input_precision=PRECISION)
                drel_w = tl.dot(ds, hot_w, drel_w, input_precision=PRECISION)
        acc, acc_rest = acc * scale, acc_rest * scale
        if REL:
            if drel_h_ptr is not None:
                rel_at = w_plane + token[:, None] * rel + tl.arange(0, REL)[None, :]
                tl.store(drel_h_ptr + rel_at, drel_h.to(q.dtype), live[:, None])
                tl.store(drel_h_ptr + rel_at + REL, drel_w.to(q.dtype), live[:, None])
            acc, acc_rest = add_small_gradient(
                acc, acc_rest, table_h_ptr, drel_h, y - top, lines, q.dtype, HEIGHT, HEAD, HEAD_A,
                HEAD_B, REL, PRECISION,
            )  # fmt: skip
            acc, acc_rest = add_small_gradient(
                acc, acc_rest, table_w_ptr, drel_w, x - left, columns, q.dtype, WIDTH, HEAD, HEAD_A,
                HEAD_B, REL, PRECISION,
            )  # fmt: skip
    else:
        rel_h_ptr += plane * height * tokens
        drel_h_ptr += plane * height * tokens
        for first in range(0, width, BLOCK_N):
            b = first + tl.arange(0, BLOCK_N)
            key_x, valid = left + b, b < width
            w_tile_at, w_mask = token[:, None] * rel + b[None, :], live[:, None] & valid[None, :]
            tile_w = tl.load(rel_w_ptr + w_plane + w_tile_at, w_mask, other=0.0)
            tile_w = tile_w.to(tl.float32) * UNIT  # (BLOCK_M, BLOCK_N)
            if not EVEN:
                tile_w = tl.where(valid[None, :], tile_w, float("-inf"))
            dtile_w = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            ahead = tl.load(rel_h_ptr + token, live, other=0.0)
            for a in range(0, height):
                column = ahead
                after = tl.minimum(a + 1, height - 1)
                ahead = tl.load(rel_h_ptr + after * tokens + token, live, other=0.0)
                now_at = drel_h_ptr + a * tokens + token
                key_y = tl.zeros_like(b) + top + a
                inside = valid & (key_y < image_height) & (key_x < image_width)
                k, k_rest = load_keys(
                    k_ptr, pad_k_ptr, key_y, key_x, inside, valid, stride_ky, stride_kx, stride_pkp,
                    image_height, image_width, width, across, PADS, WIDE, EVEN, HEAD, HEAD_A,
                    HEAD_B,
                )  # fmt: skip
                s = dot_nt(q, q_rest, k, k_rest, HEAD_B, PRECISION)  # (BLOCK_M, BLOCK_N)
                p = power(s * (scale * UNIT) + (tile_w + column[:, None]), NATURAL)
                if share_ptr is not None:
                    p *= share[:, None]
                v, v_rest = load_keys(
                    v_ptr, pad_v_ptr, key_y, key_x, inside, valid, stride_vy, stride_vx, stride_pvp,
                    image_height, image_width, width, across, PADS, WIDE, EVEN, HEAD, HEAD_A,
                    HEAD_B,
                )  # fmt: skip
                dp = dot_nt(dout, dout_rest, v, v_rest, HEAD_B, PRECISION)
                ds = p * (dp - delta[:, None])
                dtile_w += ds
                dcolumn = tl.sum(ds, 1)
                if SEVERAL:
                    again = live & (tl.zeros_like(token) + first > 0)
                    dcolumn += tl.load(now_at, again, other=0.0)
                tl.store(now_at, dcolumn.to(drel_h_ptr.dtype.element_ty), live)
                ds = ds.to(q.dtype)
                acc = tl.dot(ds, k, acc, input_precision=PRECISION)
                if HEAD_B:
                    acc_rest = tl.dot(ds, k_rest, acc_rest, input_precision=PRECISION)
            tl.store(drel_w_ptr + w_plane + w_tile_at, dtile_w.to(q.dtype), w_mask)
            tl.debug_barrier()  # the next tiles of these lines add to what was stored here
        drel_w_ptr += w_plane
        # Every thread of the program has to be here before it reads what the others stored.
        tl.debug_barrier()
        acc, acc_rest = acc * scale, acc_rest * scale
        _, y, x = queries(tile * BLOCK_M, top, left, lines, columns, False, False, FULL, BLOCK_M)
        start, stop = lines_met(tile * BLOCK_M, height, lines, columns, BLOCK_M)
        acc, acc_rest = add_factor_gradient(
            acc, acc_rest, table_h_ptr, drel_h_ptr, token, tokens, y - top, live, height, start,
            stop, q.dtype, HEAD, HEAD_A, HEAD_B, BLOCK_T, PRECISION,
        )  # fmt: skip
        acc, acc_rest = add_factor_gradient(
            acc, acc_rest, table_w_ptr, drel_w_ptr, token * rel, 1, x - left, live, width,
            width - columns, 2 * width - 1, q.dtype, HEAD, HEAD_A, HEAD_B, BLOCK_T, PRECISION,
        )  # fmt: skip
    dq_at = start_of(dq_ptr, image, head, stride_dqb, stride_dqn)
    dq_at = pixels(dq_at, y, x, stride_dqy, stride_dqx, WIDE)
    store_head(dq_at, acc, acc_rest, live, HEAD, HEAD_A, HEAD_B)


@triton.jit
def two_rows(first_ptr, second_ptr, at, live):
    """What two rows of float32 hold at these places, by one load.

    Triton makes a load of fewer elements than there are threads once for each thread that needs
    one, as often as it needs them.
    """
    which = tl.arange(0, 2)[:, None] == 0
    both = tl.where(which, first_ptr + at[None, :], second_ptr + at[None, :])
    return tl.split(tl.trans(tl.load(both, live[None, :], other=0.0)))


@triton.jit(launch_metadata=launched(__package__, costs.dkv_kernel, "q_ptr"))
def dkv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    pad_k_ptr,
    pad_v_ptr,
    rel_h_ptr,
    rel_w_ptr,
    lse_ptr,
    delta_ptr,
    share_ptr,
    dk_ptr,
    dv_ptr,
    dpad_k_ptr,
    dpad_v_ptr,
    stride_gb,
    stride_gy,
    stride_gx,
    stride_gn,
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
    stride_dkb,
    stride_dky,
    stride_dkx,
    stride_dkn,
    stride_dvb,
    stride_dvy,
    stride_dvx,
    stride_dvn,
    stride_dpkb,
    stride_dpkp,
    stride_dpkn,
    stride_dpvb,
    stride_dpvp,
    stride_dpvn,
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
    NEED_K: tl.constexpr,
    NEED_V: tl.constexpr,
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
    PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of the image and of the padding; one program per keys.

    NATURAL, EVEN, REL, HEIGHT, WIDTH, PITCH: as in the forward; factors lie as dq writes them
    NEED_K, NEED_V: GIVEN_PADS where the padding's is wanted, else NO_PADS
    PAIR: by rows, whether rel_h and delta of a tile are as many numbers as there are threads
    """
    if HEIGHT:
        height, width = HEIGHT, WIDTH
    tile, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    image, head, top, left, lines, columns = place(
        group, heads, height, width, image_height, image_width, down, across
    )
    LINE: tl.constexpr = FLAT and REL == 0
    if ONE_HOT:
        line, b, valid = key_places(tile * BLOCK_N, height, width, BLOCK_N, PITCH, LINE)
        first_line, first_b = tile * BLOCK_N // (PITCH if PITCH else width), 0
    else:
        first_line = tile // tl.cdiv(width, BLOCK_N)
        first_b = (tile - first_line * tl.cdiv(width, BLOCK_N)) * BLOCK_N
        b = first_b + tl.arange(0, BLOCK_N)
        line = tl.zeros_like(b) + first_line
        valid = b < width
    WANTED: tl.constexpr = (NEED_K == GIVEN_PADS) | (NEED_V == GIVEN_PADS)
    if not WANTED:
        if (first_line >= lines) | (first_b >= columns):  # only padding tokens
            return
    key_y, key_x = top + line, left + b
    inside = keys_inside(key_y, key_x, valid, image_height, image_width, LINE)
    k, k_rest = load_keys(
        start_of(k_ptr, image, head, stride_kb, stride_kn),
        start_of(pad_k_ptr, image, head, stride_pkb, stride_pkn) if PADS == GIVEN_PADS else k_ptr,
        key_y, key_x, inside, valid, stride_ky, stride_kx, stride_pkp, image_height, image_width,
        width, across, PADS, WIDE, EVEN, HEAD, HEAD_A, HEAD_B,
    )  # fmt: skip
    v, v_rest = load_keys(
        start_of(v_ptr, image, head, stride_vb, stride_vn),
        start_of(pad_v_ptr, image, head, stride_pvb, stride_pvn) if PADS == GIVEN_PADS else v_ptr,
        key_y, key_x, inside, valid, stride_vy, stride_vx, stride_pvp, image_height, image_width,
        width, across, PADS, WIDE, EVEN, HEAD, HEAD_A, HEAD_B,
    )  # fmt: skip

    UNIT: tl.constexpr = 1.0 if NATURAL else LOG2E
    LATE: tl.constexpr = (PITCH > 0) and (q_ptr.dtype.element_ty == tl.float16)  # as the forward
    BASE: tl.constexpr = 1.0 if LATE else UNIT
    MORE: tl.constexpr = UNIT if LATE else 1.0
    tokens = image_height * image_width
    plane = image.to(tl.int64) * heads + head
    q_ptr = start_of(q_ptr, image, head, stride_qb, stride_qn)
    dout_ptr = start_of(dout_ptr, image, head, stride_gb, stride_gn)
    lse_ptr += plane * tokens
    delta_ptr += plane * tokens
    if share_ptr is not None:
        share_ptr += plane * tokens
    if ONE_HOT:
        if REL:
            rel_h_ptr += plane * tokens * rel
            offs_r = tl.arange(0, 2 * REL)
            hot = one_hot(line, valid, 2 * REL) | one_hot(REL + b, valid, 2 * REL)
            hot = hot.to(k.dtype)  # (BLOCK_N, 2 · REL)
    else:
        rel_h_ptr += (plane * height + first_line) * tokens
        rel_w_ptr += plane * tokens * rel
    REST: tl.constexpr = HEAD_B if HEAD_B else 16
    dk = tl.zeros((BLOCK_N, HEAD_A), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD_A), tl.float32)
    dk_rest = tl.zeros((BLOCK_N, REST), tl.float32)
    dv_rest = tl.zeros((BLOCK_N, REST), tl.float32)
    if PITCH:
        small_y, small_x = small_places(columns, BLOCK_M)
    for first in range(0, positions(lines, columns, PITCH > 0), BLOCK_M):
        # What differs from tile to tile is one number, but where lines are as long as they are.
        if PITCH:
            base = first >> shift_of(columns)
            live = (small_y + base < lines) & (small_x < columns)
            y, x = small_y + top, small_x + left
        elif FLAT:
            base = first
            x = tl.arange(0, BLOCK_M)
            y, live = tl.zeros_like(x), x + first < lines * columns
            if FULL:
                live = tl.full((BLOCK_M,), True, tl.int1)
        else:
            base = first * 0
            live, y, x = queries(first, top, left, lines, columns, False, FLAT, FULL, BLOCK_M)
        token = y * image_width + x
        before = base * (image_width if PITCH else 1)
        step = stride_qy if PITCH else stride_qx
        q_at = pixels(further(q_ptr, base, step, WIDE), y, x, stride_qy, stride_qx, WIDE)
        q, q_rest = load_head(q_at, live, HEAD, HEAD_A, HEAD_B, True)
        s = dot_nt(k, k_rest, q, q_rest, HEAD_B, PRECISION)  # (BLOCK_N, BLOCK_M)
        if ONE_HOT:
            lse = tl.load(lse_ptr + before + token, live, other=0.0) * UNIT
        elif PAIR:
            column, delta = two_rows(rel_h_ptr + before, delta_ptr + before, token, live)
        else:
            column = tl.load(rel_h_ptr + before + token, live, other=0.0)
        if REL == 0:
            p = power(s * (scale * UNIT) - lse[None, :], NATURAL)
        elif ONE_HOT:
            rel_at = rel_h_ptr + before * rel + (token[:, None] * rel + offs_r[None, :])
            factors = tl.load(rel_at, live[:, None], other=0.0)  # (BLOCK_M, 2 · REL)
            s *= scale * BASE
            s = tl.dot(hot, tl.trans(factors), s, input_precision=PRECISION)
            p = power(s * MORE - lse[None, :], NATURAL)
        else:
            w_at = rel_w_ptr + before * rel + (token[None, :] * rel + b[:, None])
            tile_w = tl.load(w_at, live[None, :] & valid[:, None], other=0.0).to(tl.float32)
            s = s * (scale * UNIT) + (tile_w * UNIT + column[None, :])
            p = power(s, NATURAL)
        step = stride_gy if PITCH else stride_gx
        g_at = pixels(further(dout_ptr, base, step, WIDE), y, x, stride_gy, stride_gx, WIDE)
        dout, dout_rest = load_head(g_at, live, HEAD, HEAD_A, HEAD_B, True)
        if share_ptr is not None:
            p *= tl.load(share_ptr + before + token, live, other=0.0)[None, :]
        small = p.to(dout.dtype)
        dv = tl.dot(small, dout, dv, input_precision=PRECISION)
        if HEAD_B:
            dv_rest = tl.dot(small, dout_rest, dv_rest, input_precision=PRECISION)
        if ONE_HOT or not PAIR:
            delta = tl.load(delta_ptr + before + token, live, other=0.0)
        dp = dot_nt(v, v_rest, dout, dout_rest, HEAD_B, PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if HEAD_B:
            dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)

    dk_at = key_rows(
        start_of(dk_ptr, image, head, stride_dkb, stride_dkn),
        start_of(dpad_k_ptr, image, head, stride_dpkb, stride_dpkn)
        if NEED_K == GIVEN_PADS
        else dk_ptr,
        key_y, key_x, inside, stride_dky, stride_dkx, stride_dpkp, image_height, image_width,
        width, across, NEED_K, WIDE,
    )  # fmt: skip
    wanted = valid if NEED_K == GIVEN_PADS else inside
    store_head(dk_at, dk * scale, dk_rest * scale, wanted, HEAD, HEAD_A, HEAD_B)
    dv_at = key_rows(
        start_of(dv_ptr, image, head, stride_dvb, stride_dvn),
        start_of(dpad_v_ptr, image, head, stride_dpvb, stride_dpvn)
        if NEED_V == GIVEN_PADS
        else dv_ptr,
        key_y, key_x, inside, stride_dvy, stride_dvx, stride_dpvp, image_height, image_width,
        width, across, NEED_V, WIDE,
    )  # fmt: skip
    wanted = valid if NEED_V == GIVEN_PADS else inside
    store_head(dv_at, dv, dv_rest, wanted, HEAD, HEAD_A, HEAD_B)
