# SPDX-License-Identifier: Apache-2.0
"""FLOP, bytes and launches of each stage of the branch on a GPU, by design.

A function named after a kernel returns the FLOP of one launch, from its arguments.
"""

from samfast.kernels.lora_linear import costs as low_rank
from samfast.kernels.lora_linear.costs import Stage
from samfast.kernels.lora_linear.engine import MAX_CHUNKS

MAX_ALONG = 2**25  # bytes of partials that G may take where the pass over whole rows makes it


def _program_rows(bottleneck: int) -> int:
    """The usual BLOCK_M of the backward: one float32 partial of G for each."""
    return 64 if bottleneck <= 32 else 32 if bottleneck <= 64 else 16


def low_kernel(tokens, columns, ranks, **_) -> int:
    return low_rank.product(tokens, columns, ranks)


def low_backward_kernel(tokens, columns, ranks, NEED_DX, NEED_PARTS, **_) -> int:
    return (2 * NEED_DX + NEED_PARTS) * low_rank.product(tokens, columns, ranks)


def gradient_kernel(tokens, columns, ranks, **_) -> int:
    return low_rank.product(tokens, columns, ranks)


def stages(
    tokens: int, width: int, bottleneck: int, itemsize: int, inside: bool = False
) -> list[Stage]:
    """Forward and backward with everything trained, and gradients of x and base.

    inside: a fused block, where lin2's bias includes b_up, x is made again, and its gradient is
        added to an existing one
    """
    rows = itemsize * tokens * width
    product = low_rank.product(tokens, width, bottleneck)
    every = low_rank.stages(tokens, width, width, bottleneck, itemsize)
    up, up_backward, reduce = every[3:6]
    inward, of_one = (3 if inside else 2) * rows, 4 * bottleneck * width
    parts = of_one * -(-tokens // _program_rows(bottleneck))
    back = [Stage("norm backward, G", 3 * product, inward + parts, 1)]
    if parts > MAX_ALONG:
        parts = of_one * MAX_CHUNKS
        back = [
            Stage("norm backward", 2 * product, inward, 1),
            Stage("G", product, rows + parts, 1),
        ]
    bias = Stage("b_lin2 + b_up", 0, 3 * itemsize * width, 1)
    return [
        Stage("LN, down, ReLU, drop", product, rows, 1),
        bias if inside else Stage("base + b_up", 0, 2 * rows, 1),
        up,
        Stage("db_up", 0, rows, 1),
        up_backward,
        reduce,
        *([Stage("x again", 0, 2 * rows, 1)] if inside else []),
        *back,
        Stage("d_down, d_norm, from G", 0, parts, 1),
    ]
