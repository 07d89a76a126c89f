# SPDX-License-Identifier: Apache-2.0
"""Attention within windows, every logit in memory: the specification."""

import torch
from torch import Tensor

from samfast.kernels._common.windows import Windows


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q, k, v (…, tokens, head_dim) -> as q: softmax(scale · q kᵀ) v."""
    return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v


def rotated(t: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """t (…, rows, heads, head_dim), each pair of features times cos + i sin of its row.

    cos, sin: (rows, head_dim / 2)
    halves: pairs are i and i + head_dim / 2, else 2i and 2i + 1
    """
    wide = torch.promote_types(t.dtype, torch.float32)
    t_wide, at = t.to(wide), -2 if halves else -1
    a, b = t_wide.unflatten(-1, (2, -1) if halves else (-1, 2)).unbind(at)
    made = torch.complex(a, b) * torch.complex(cos.to(wide), sin.to(wide))[:, None]
    return torch.stack([made.real, made.imag], at).flatten(-2).to(t.dtype)


def padding_rows(pad_bias, pad_h, pad_b, turn, halves: bool, windows: Windows, qkv: Tensor):
    """The rows of qkv at the padding, (batch · pads, 3, heads, head_dim).

    qkv: (batch, H, W, 3, heads, head_dim)   turn: cos and sin that rotate the keys, or None
    """
    shape = (windows.batch * windows.pads, *qkv.shape[3:])
    rows = qkv.new_zeros(shape).flatten(1)
    rows = rows if pad_bias is None else rows + pad_bias.to(qkv.dtype)
    rows = rows if pad_h is None else rows + pad_h.to(qkv.dtype) @ pad_b.to(qkv.dtype).T
    q, k, v = rows.view(shape).unbind(1)
    if turn is not None:
        by_image = k.unflatten(0, (windows.batch, windows.pads))
        k = rotated(by_image, *turn, halves).flatten(0, 1)
    return torch.stack([q, k, v], 1)


def window_attention(qkv: Tensor, pad: Tensor, windows: Windows, scale: float) -> Tensor:
    """qkv (batch, H, W, 3, heads, head_dim), pad (batch · pads, 3, heads, head_dim), the rows of
    the padding -> (batch, H, W, heads, head_dim)."""
    heads, head_dim = qkv.shape[4:]
    parts = windows.cut(qkv.reshape(windows.tokens, 3 * heads * head_dim), pad.flatten(1)).flatten(
        1, 2
    )
    q, k, v = parts.unflatten(2, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)
    out = attention(q, k, v, scale).transpose(1, 2).flatten(2)
    out = out.unflatten(1, (windows.height, windows.width))
    return windows.paste(out)[0].view(*qkv.shape[:3], heads, head_dim)
