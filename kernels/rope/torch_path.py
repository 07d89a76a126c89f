# SPDX-License-Identifier: Apache-2.0
"""The rotation from aten calls: any dtype, any device. All paths have this function."""

from torch import Tensor

from samfast.kernels._common.windows import Windows
from samfast.kernels.rope.tables import image_rows


def rotate(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, windows: Windows, halves: bool, inverse: bool
) -> None:
    """Fills out with x rotated; both (B, H, W, n, heads, head_dim), and may be the same tensor.

    cos, sin: (height · width, head_dim / 2), float32 (float64 for float64)
    """
    cos, sin = (image_rows(t, windows)[:, :, None, None] for t in (cos, sin))
    sin = -sin if inverse else sin
    a, b = (t.to(cos.dtype) for t in _pairs(x, halves))
    first, second = a * cos, b * cos
    first.addcmul_(b, sin, value=-1.0)
    second.addcmul_(a, sin)
    for target, made in zip(_pairs(out, halves), (first, second), strict=True):
        target.copy_(made)


def _pairs(t: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second feature of every pair."""
    if halves:
        return t.chunk(2, -1)
    return t[..., 0::2], t[..., 1::2]
