# SPDX-License-Identifier: Apache-2.0
"""Attention with a decomposed relative-position bias, every logit in memory: the specification."""

import torch
from torch import Tensor

from samfast.kernels._common.windows import Windows


def offsets_of(size: int, device: torch.device) -> Tensor:
    """(size, size): the row of a table (2 · size − 1, head_dim) for query i and key j."""
    at = torch.arange(size, device=device)
    return at[:, None] - at[None, :] + size - 1


def relpos_attention(q, k, v, table_h: Tensor, table_w: Tensor, scale: float) -> Tensor:
    """q, k, v (B, heads, H, W, head_dim), tables (2 · size − 1, head_dim) -> as q.

    softmax(scale · q kᵀ + bias) v, bias[i, j] = q_i · table_h[h_i − h_j] + q_i · table_w[w_i − w_j]
    """
    height, width = q.shape[2:4]
    near_h = table_h[offsets_of(height, q.device)].to(q.dtype)  # (H, H, head_dim)
    near_w = table_w[offsets_of(width, q.device)].to(q.dtype)
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", q, near_h)
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", q, near_w)
    bias = rel_h[..., :, None] + rel_w[..., None, :]  # (B, heads, H, W, H, W)
    q, k, v = (t.flatten(2, 3) for t in (q, k, v))
    logits = (q * scale) @ k.transpose(-2, -1) + bias.flatten(2, 3).flatten(3)
    return (logits.softmax(-1) @ v).unflatten(2, (height, width))


def window_relpos_attention(
    qkv: Tensor, pad: Tensor, num_heads: int, windows: Windows, table_h, table_w, scale: float
) -> Tensor:
    """qkv (B, H, W, 3 · D) and pad (B · pads, 3 · D), rows of the padding -> (B, H, W, D)."""
    parts = windows.cut(qkv.reshape(windows.tokens, qkv.shape[3]), pad)
    head_dim = qkv.shape[3] // (3 * num_heads)
    q, k, v = parts.unflatten(-1, (3, num_heads, head_dim)).permute(3, 0, 4, 1, 2, 5)
    out = relpos_attention(q, k, v, table_h, table_w, scale)
    return windows.paste(out.movedim(1, 3).flatten(3))[0].view(*qkv.shape[:3], num_heads * head_dim)
