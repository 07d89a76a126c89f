# SPDX-License-Identifier: Apache-2.0
"""FLOP, bytes and launches of each stage of the GPU path, by design.

A function named after a kernel returns the FLOP of one launch, from its arguments.
"""

from samfast.kernels.lora_linear import costs as lora_costs
from samfast.kernels.lora_linear.costs import Stage

_SINGLE = 4  # cores, their factors and all gradients of both are float32
_PARTS = 32  # of a core's gradient on a GPU


def product(tokens: int, rows: int, columns: int, tasks: int, itemsize: int) -> list[Stage]:
    """z = h M_t, and dh and the parts of dM, of one layer."""
    flops, core = 2 * tokens * rows * columns, _SINGLE * tasks * rows * columns
    moved = itemsize * tokens * (rows + columns)
    return [
        Stage("z = h M", flops, moved + core, 1),
        Stage("dh, dM", 2 * flops, 2 * moved + core + _PARTS * core, 1),
    ]


def cores(layers: int, rows: int, columns: int, depth: int, tasks: int) -> list[Stage]:
    """The cores of all layers and, from their gradients, those of what they are made of."""
    given = _SINGLE * layers * depth * (rows * columns + tasks)
    made = _SINGLE * layers * tasks * rows * columns
    flops = 2 * layers * tasks * rows * columns * depth
    parts = _PARTS * made
    adding = layers * tasks * rows * columns * _PARTS
    return [
        Stage("gather", 0, 2 * given, 1),
        Stage("M", flops, given + made, 1),
        Stage("stack dM", 0, 2 * parts, 1),
        Stage("gather again", 0, 2 * given, 1),
        Stage("dG, dU3", 2 * flops + adding, parts + 2 * given, 1),
    ]


def product_kernel(h_ptr, rows, columns, **_) -> int:
    return 2 * h_ptr.shape[0] * rows * columns


def product_backward_kernel(h_ptr, rows, columns, dh_ptr, dm_ptr, **_) -> int:
    needs = (dh_ptr is not None) + (dm_ptr is not None)
    return needs * 2 * h_ptr.shape[0] * rows * columns


def fold_kernel(m_ptr, depth, **_) -> int:
    return 2 * m_ptr.numel() * depth


def fold_backward_kernel(dm_ptr, parts, depth, **_) -> int:
    """Products for both gradients, and the sum of the parts."""
    return 4 * (dm_ptr.numel() // parts) * depth + dm_ptr.numel()


def stages(
    tokens: int, features: int, out: int, ranks: tuple[int, int, int], tasks: int, itemsize: int
) -> list[Stage]:
    """Forward and backward of one adapted layer, with the fold of only its own cores. LoRA's part
    is that of the larger rank."""
    rows, columns, depth = ranks
    return [
        *lora_costs.stages(tokens, features, out, max(rows, columns), itemsize),
        *product(tokens, rows, columns, tasks, itemsize),
        *cores(1, rows, columns, depth, tasks),
    ]
