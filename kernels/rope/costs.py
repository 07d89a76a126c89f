# SPDX-License-Identifier: Apache-2.0
"""FLOP, bytes and launches of the rotation on a GPU, by design.

A function named after a kernel returns the FLOP of one launch, from its arguments.
"""

from samfast.kernels.lora_linear.costs import Stage

PER_PAIR = 6  # four products and two sums
_TABLE = 4  # bytes of an angle's cosine, and of its sine


def rotation(tokens: int, rows: int, head_dim: int) -> int:
    """FLOP; rows: heads of a token, of q and k together."""
    return PER_PAIR * tokens * rows * (head_dim // 2)


def stages(
    tokens: int, positions: int, heads: int, head_dim: int, itemsize: int, parts: int = 2
) -> list[Stage]:
    """In place, forward and backward; positions: rows of the tables, read once."""
    flops = rotation(tokens, parts * heads, head_dim)
    moved = 2 * itemsize * tokens * parts * heads * head_dim
    moved += 2 * _TABLE * positions * (head_dim // 2)
    return [Stage("rotate", flops, moved, 1), Stage("rotate back", flops, moved, 1)]


def rotate_kernel(x_ptr, **_) -> int:
    return PER_PAIR * (x_ptr.numel() // 2)
