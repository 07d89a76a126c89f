# SPDX-License-Identifier: Apache-2.0
"""The rotation in C++ (csrc/cpu/rope.cpp); the function is that of torch_path."""

import torch

_native = torch.ops.samfast_native


def rotate(x, out, cos, sin, windows, halves, inverse):
    """Fills out with x rotated; the same tensor is rotated in place."""
    given = x if x.stride(-1) == 1 else x.contiguous()
    _native.rope_rotate(given, cos, sin, windows, halves, inverse, out)
