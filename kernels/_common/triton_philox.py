# SPDX-License-Identifier: Apache-2.0
"""The dropout mask of philox.py inside a Triton kernel, one tile at a time."""

import triton
import triton.language as tl


@triton.jit
def dropout_tile(
    x,
    seed,
    rows,
    first_column,
    columns,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """x · keep / (1 − p) for the tile at (rows, first_column) of a matrix with so many columns.

    x (BLOCK_M, BLOCK_N); rows (BLOCK_M,) int64; first_column a multiple of four.
    """
    blocks = (columns + 3) // 4
    offs = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    counter = rows[:, None] * blocks + offs[None, :]  # (BLOCK_M, BLOCK_N / 4)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_M, BLOCK_N / 4, 2, 2)
    words = tl.reshape(words, (BLOCK_M, BLOCK_N))
    kept = words >= tl.cast(threshold, tl.uint32)
    return tl.where(kept, x.to(tl.float32) * scale, 0.0).to(x.dtype)
