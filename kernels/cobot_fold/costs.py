# SPDX-License-Identifier: Apache-2.0
"""FLOP of the fold on a GPU, where a slice has rows of ``width`` numbers.

A function named after a kernel returns the FLOP of one launch, from its arguments.
"""


def fold(count: int, width: int, slices: int, rows: int, down: bool) -> int:
    """FLOP of ``count`` slices' coefficients, factors and biases, among ``slices`` in all."""
    return count * 2 * width * (slices + width * (rows + down))


def fold_backward(count: int, width: int, slices: int, rows: int, down: bool) -> int:
    """FLOP of the gradients of factors, of what they are multiplied by, and of biases."""
    return count * 2 * width * (slices + width * (2 * rows + down))


def shared_backward(count: int, width: int, slices: int) -> int:
    """FLOP of the gradients of C and P."""
    return 2 * 2 * count * width * slices


def fold_kernel(gammas_ptr, width, slices, rows, DOWN, **_) -> int:
    return fold(gammas_ptr.numel() // width, width, slices, rows, DOWN)


def fold_backward_kernel(gammas_ptr, width, slices, rows, DOWN, **_) -> int:
    return fold_backward(gammas_ptr.numel() // width, width, slices, rows, DOWN)


def shared_backward_kernel(count, width, slices, **_) -> int:
    return shared_backward(count, width, slices)
