# SPDX-License-Identifier: Apache-2.0
"""The bias of windows of at most 16 by 16, made where it is added.

A table has 31 rows at most: one product of a query with all of them gives its factors, of which it
gathers those of its place. One-hot tiles of the keys spread them over the logits.
"""

import triton
import triton.language as tl

from samfast.kernels.relpos_attention.triton_places import (
    dot_nt,
    load_head,
)


@triton.jit
def one_hot(a, valid, LINE: tl.constexpr):
    """(keys, LINE): one at column a of each valid key."""
    return (tl.arange(0, LINE)[None, :] == a[:, None]) & valid[:, None]


@triton.jit
def small_table(ptr, met, kind: tl.constexpr, HEAD: tl.constexpr, HEAD_A: tl.constexpr,
                HEAD_B: tl.constexpr, TABLE: tl.constexpr):  # fmt: skip
    """The rows of a table that queries of a window meet as ``kind``, and zeros up to TABLE rows."""
    u = tl.arange(0, TABLE)
    t, t_rest = load_head(ptr + u * HEAD, u < met, HEAD, HEAD_A, HEAD_B, True)
    return t.to(kind), t_rest.to(kind)


@triton.jit
def small_factor(q, q_rest, t, t_rest, at, BASE: tl.constexpr, SIZE: tl.constexpr,
                 HEAD_B: tl.constexpr, LINE: tl.constexpr, TABLE: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """(queries, LINE): BASE · q_i · t[at_i − a + SIZE − 1] at each a, zeros from SIZE on.

    One product with all rows of the table, of which each query takes its own.
    """
    g = dot_nt(q, q_rest, t, t_rest, HEAD_B, PRECISION) * BASE
    a = tl.arange(0, LINE)[None, :]
    row = (at[:, None] - a + (SIZE - 1)) & (TABLE - 1)
    if SIZE < LINE:
        row |= tl.where(a < SIZE, 0, TABLE - 1)  # the table's last row, which is zero
    return tl.gather(g, row, 1).to(q.dtype)


@triton.jit
def small_factors(q, q_rest, table_h_ptr, table_w_ptr, y, x, lines, columns, BASE: tl.constexpr,
                  HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
                  HEAD_A: tl.constexpr, HEAD_B: tl.constexpr, LINE: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """BASE times rel_h and rel_w (queries, LINE) of queries at lines y and columns x of a small
    window."""
    TABLE: tl.constexpr = 2 * LINE
    met = lines + HEIGHT - 1
    t, t_rest = small_table(table_h_ptr, met, q.dtype, HEAD, HEAD_A, HEAD_B, TABLE)
    rel_h = small_factor(q, q_rest, t, t_rest, y, BASE, HEIGHT, HEAD_B, LINE, TABLE, PRECISION)
    met = columns + WIDTH - 1
    t, t_rest = small_table(table_w_ptr, met, q.dtype, HEAD, HEAD_A, HEAD_B, TABLE)
    rel_w = small_factor(q, q_rest, t, t_rest, x, BASE, WIDTH, HEAD_B, LINE, TABLE, PRECISION)
    return rel_h, rel_w


@triton.jit
def small_bias(s, rel_h, rel_w, a, b, valid, LINE: tl.constexpr, PRECISION: tl.constexpr):
    """s plus the bias of keys at lines a and columns b, none where they are not valid; s (queries,
    keys); and the one-hot tiles (keys, LINE) that it takes."""
    hot_h, hot_w = one_hot(a, valid, LINE).to(rel_h.dtype), one_hot(b, valid, LINE).to(rel_h.dtype)
    s = tl.dot(rel_h, tl.trans(hot_h), s, input_precision=PRECISION)
    s = tl.dot(rel_w, tl.trans(hot_w), s, input_precision=PRECISION)
    return s, hot_h, hot_w


@triton.jit
def add_small_gradient(dq, dq_rest, table_ptr, drel, at, places, kind: tl.constexpr,
                       SIZE: tl.constexpr, HEAD: tl.constexpr, HEAD_A: tl.constexpr,
                       HEAD_B: tl.constexpr, LINE: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    """dq plus what the gradient drel (BLOCK_M, LINE) of a small window's factor gives.

    places: how many lines, or columns, of the window hold queries
    """
    TABLE: tl.constexpr = 2 * LINE
    a = at[:, None] - tl.arange(0, TABLE)[None, :] + (SIZE - 1)
    if SIZE < LINE:
        last = tl.minimum(a.to(tl.uint32, bitcast=True), LINE - 1)  # a column that is zero
        d = tl.gather(drel, last.to(tl.int32, bitcast=True), 1).to(kind)
    else:
        d = tl.gather(drel, a & (LINE - 1), 1)
        d = tl.where((a >= 0) & (a < SIZE), d, 0.0).to(kind)
    t, t_rest = small_table(table_ptr, places + SIZE - 1, kind, HEAD, HEAD_A, HEAD_B, TABLE)
    dq = tl.dot(d, t, dq, input_precision=PRECISION)
    if HEAD_B:
        dq_rest = tl.dot(d, t_rest, dq_rest, input_precision=PRECISION)
    return dq, dq_rest
