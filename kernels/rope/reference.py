# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding as a product of complex numbers, with plain autograd, any dtype and device.

Token (y, x) of an image in windows of height × width has row (y % height) · width + x % width of
the tables.
"""

import torch


def rotate(t, cos, sin, windows, halves, inverse=False):
    """A rotated copy of t (B, H, W, n, heads, head_dim).

    cos, sin: (height · width, head_dim / 2)   halves: pairs are features i and i + head_dim / 2
    """
    wide = torch.promote_types(t.dtype, torch.float32)
    y = torch.arange(windows.image_height, device=t.device)[:, None]
    x = torch.arange(windows.image_width, device=t.device)[None, :]
    row = (y % windows.height) * windows.width + x % windows.width  # (H, W)
    turn = torch.complex(cos.to(wide), -sin.to(wide) if inverse else sin.to(wide))[row]
    turn = turn[:, :, None, None]  # (H, W, 1, 1, head_dim / 2)
    pairs = t.to(wide).unflatten(-1, (2, -1) if halves else (-1, 2))
    a, b = pairs.unbind(-2 if halves else -1)
    made = torch.complex(a, b) * turn
    dim = -2 if halves else -1
    return torch.stack([made.real, made.imag], dim).flatten(-2).to(t.dtype)


def rope(qkv, cos, sin, windows, parts, halves):
    """qkv (B, H, W, 3, heads, head_dim) with its first ``parts`` thirds rotated."""
    turned = rotate(qkv[:, :, :, :parts], cos, sin, windows, halves)
    return torch.cat([turned, qkv[:, :, :, parts:]], 3)
