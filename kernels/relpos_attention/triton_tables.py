# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the tables' gradients, from those of the factors: partials and their sum.

dtable = Σ_i Dᵢᵀ qᵢ, where row u of the reversed table meets query i at key u + i − (size − 1).
"""

import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.relpos_attention import costs
from samfast.kernels.relpos_attention.triton_places import (
    load_rows,
    pixels,
    place,
    queries,
    start_of,
    store_rows,
)


@triton.jit
def skewed(drel_ptr, row, step, at, live, size, u, kind: tl.constexpr):
    """(queries, BLOCK_T): gradients of the factors, at the reversed table's rows u they came of,
    as ``kind``."""
    key = u[None, :] + at[:, None] - (size - 1)
    mask = live[:, None] & (key >= 0) & (key < size)
    return tl.load(drel_ptr + (row[:, None] + key * step), mask, other=0.0).to(kind)


@triton.jit(launch_metadata=launched(__package__, costs.tables_kernel, "q_ptr"))
def tables_kernel(
    q_ptr,
    drel_h_ptr,
    drel_w_ptr,
    part_ptr,
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
    all_tiles,
    chunk_tiles,
    ONE_HOT: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Partial gradients of the tables, of chunks of tiles of queries and of BLOCK_T rows.

    part (chunks, 2 · height − 1 + 2 · width − 1, head_dim)
    """
    blocks_h, blocks_w = tl.cdiv(2 * height - 1, BLOCK_T), tl.cdiv(2 * width - 1, BLOCK_T)
    block = tl.program_id(0) % (blocks_h + blocks_w)
    chunk = tl.program_id(0) // (blocks_h + blocks_w)
    of_w = block >= blocks_h
    size = tl.where(of_w, width, height)
    u = tl.where(of_w, block - blocks_h, block) * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens = image_height * image_width
    kind: tl.constexpr = q_ptr.dtype.element_ty
    REST: tl.constexpr = HEAD_B if HEAD_B else 16
    acc = tl.zeros((BLOCK_T, HEAD_A), tl.float32)
    acc_rest = tl.zeros((BLOCK_T, REST), tl.float32)
    for n in range(0, tl.minimum(chunk_tiles, all_tiles - chunk * chunk_tiles)):
        number = chunk * chunk_tiles + n
        tile, group = number % tiles, number // tiles
        image, head, top, left, lines, columns = place(
            group, heads, height, width, image_height, image_width, down, across
        )
        live, y, x = queries(tile * BLOCK_M, top, left, lines, columns, False, False, FULL, BLOCK_M)
        token = y * image_width + x
        plane = image.to(tl.int64) * heads + head
        at = tl.where(of_w, x - left, y - top)
        if ONE_HOT:
            drel_ptr = drel_h_ptr + plane * tokens * rel + tl.where(of_w, rel // 2, 0)
            d = skewed(drel_ptr, token * rel, 1, at, live, size, u, kind)
        else:
            h_ptr, w_ptr = drel_h_ptr + plane * height * tokens, drel_w_ptr + plane * tokens * rel
            if drel_h_ptr.dtype == drel_w_ptr.dtype:
                drel_ptr = tl.where(of_w, w_ptr, h_ptr)
                row, step = tl.where(of_w, token * rel, token), tl.where(of_w, 1, tokens)
                d = skewed(drel_ptr, row, step, at, live, size, u, kind)
            elif of_w:
                d = skewed(w_ptr, token * rel, 1, at, live, size, u, kind)
            else:
                d = skewed(h_ptr, token, tokens, at, live, size, u, kind)
        q_at = start_of(q_ptr, image, head, stride_qb, stride_qn)
        q_at = pixels(q_at, y, x, stride_qy, stride_qx, WIDE)
        q = load_rows(q_at, live, 0, HEAD_A, HEAD, True)
        acc = tl.dot(tl.trans(d), q, acc, input_precision=PRECISION)
        if HEAD_B:
            q_rest = load_rows(q_at, live, HEAD_A, HEAD_B, HEAD, True)
            acc_rest = tl.dot(tl.trans(d), q_rest, acc_rest, input_precision=PRECISION)
    rows = 2 * height - 1 + 2 * width - 1
    table_row = tl.where(of_w, 2 * height - 1, 0) + 2 * size - 2 - u
    part_at = part_ptr + (chunk.to(tl.int64) * rows + table_row) * HEAD
    store_rows(part_at, acc, u < 2 * size - 1, 0, HEAD_A, HEAD)
    if HEAD_B:
        store_rows(part_at, acc_rest, u < 2 * size - 1, HEAD_A, HEAD_B, HEAD)


@triton.jit(launch_metadata=launched(__package__))
def reduce_kernel(part_ptr, grad_ptr, size, parts, BLOCK: tl.constexpr):
    """Σ over the parts, in order, of arrays of ``size`` floats."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    at = part_ptr + offs
    for _ in range(0, parts):
        total += tl.load(at, offs < size, other=0.0)
        at += size
    tl.store(grad_ptr + offs, total, offs < size)
