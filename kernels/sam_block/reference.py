# SPDX-License-Identifier: Apache-2.0
"""SAM's transformer block, literally, with plain autograd: the specification."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention.reference import relpos_attention

Maps = Callable[[Tensor], Tensor]  # of (N, H, W, features)


def sam_block(
    x: Tensor, norm1: Maps, qkv: Maps, proj: Maps, norm2: Maps, lin1: Maps, lin2: Maps,
    table_h: Tensor | None, table_w: Tensor | None, heads: int, window: int, scale: float,
    kind: str = "relpos", halves: bool = False, factors: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """x (B, H, W, D) -> (B, H, W, D); the layers may be linear, adapted, or any other function.

    x1 = x + f1 · proj(attention(qkv(norm1(x))))        y = x1 + f2 · lin2(gelu(lin1(norm2(x1))))

    window: side of the windows that qkv, attention and proj see, padded with zeros after norm1
        at the bottom and right; 0 for the whole map
    kind, tables: of the attention: "relpos", (2 · side − 1, head_dim) of the windows; "rope", cos
        and sin of the windows' positions, (side · side, head_dim / 2); "plain", None
    halves: whether rope turns features i and i + head_dim / 2 together, not 2i and 2i + 1
    factors: f1 and f2, (B,) each; 1 where None
    """
    f1, f2 = (1.0, 1.0) if factors is None else (f[:, None, None, None] for f in factors)
    windows = Windows(*x.shape[:3], window, window) if window else Windows.whole(*x.shape[:3])
    tables = table_h, table_w
    out = attention(windows.cut(norm1(x)), qkv, proj, *tables, heads, scale, kind, halves)
    x = x + f1 * windows.paste(out)[0].view(x.shape)
    return x + f2 * lin2(F.gelu(lin1(norm2(x))))


def attention(
    x: Tensor, qkv: Maps, proj: Maps, table_h: Tensor | None, table_w: Tensor | None, heads: int,
    scale: float, kind: str = "relpos", halves: bool = False,
) -> Tensor:  # fmt: skip
    """x (windows, height, width, D) -> (windows, height, width, D), each window on its own."""
    packed = qkv(x)  # (windows, height, width, 3 · D)
    size = packed.shape[-1] // (3 * heads)
    q, k, v = packed.unflatten(-1, (3, heads, size)).permute(3, 0, 4, 1, 2, 5)
    if kind == "relpos":
        out = relpos_attention(q, k, v, table_h, table_w, scale)
    else:
        q, k, v = (t.flatten(2, 3) for t in (q, k, v))
        if kind == "rope":
            q, k = (_turned(t, table_h, table_w, halves) for t in (q, k))
        weights = (scale * q @ k.transpose(-2, -1)).softmax(-1)
        out = (weights @ v).unflatten(2, x.shape[1:3])
    return proj(out.movedim(1, 3).flatten(3))


def _turned(t: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """t (…, tokens, head_dim): each pair (a, b) is (a cos − b sin, b cos + a sin)."""
    cos, sin = cos.to(t.dtype), sin.to(t.dtype)
    a, b = t.unflatten(-1, (2, -1) if halves else (-1, 2)).unbind(-2 if halves else -1)
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)
