# SPDX-License-Identifier: Apache-2.0
"""SAM's transformer block, literally, with plain autograd: the specification."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention.reference import relpos_attention

Maps = Callable[[Tensor], Tensor]  # of (N, H, W, features)


def sam_block(
    x: Tensor, norm1: Maps, qkv: Maps, proj: Maps, norm2: Maps, lin1: Maps, lin2: Maps,
    table_h: Tensor, table_w: Tensor, heads: int, window: int, scale: float,
) -> Tensor:  # fmt: skip
    """x (B, H, W, D) -> (B, H, W, D); the layers may be linear, adapted, or any other function.

    x1 = x + proj(attention(qkv(norm1(x))))        y = x1 + lin2(gelu(lin1(norm2(x1))))

    window: side of the windows that qkv, attention and proj see, padded with zeros after norm1
        at the bottom and right; 0 for the whole map
    tables: (2 · side − 1, head_dim) of the windows
    """
    windows = Windows(*x.shape[:3], window, window) if window else Windows.whole(*x.shape[:3])
    out = attention(windows.cut(norm1(x)), qkv, proj, table_h, table_w, heads, scale)
    x = x + windows.paste(out)[0].view(x.shape)
    return x + lin2(F.gelu(lin1(norm2(x))))


def attention(
    x: Tensor, qkv: Maps, proj: Maps, table_h: Tensor, table_w: Tensor, heads: int, scale: float
) -> Tensor:
    """x (windows, height, width, D) -> (windows, height, width, D), each window on its own."""
    packed = qkv(x)  # (windows, height, width, 3 · D)
    size = packed.shape[-1] // (3 * heads)
    q, k, v = packed.unflatten(-1, (3, heads, size)).permute(3, 0, 4, 1, 2, 5)
    return proj(relpos_attention(q, k, v, table_h, table_w, scale).movedim(1, 3).flatten(3))
