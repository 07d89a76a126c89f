# SPDX-License-Identifier: Apache-2.0
"""Ways to compute SAM's attention that others offer, with what autograd makes of them.

Each takes q, k, v (n, tokens, head_dim), the unscaled queries' factors rel_h (n, H, W, H) and rel_w
(n, H, W, W), the scale, and gives (n, tokens, head_dim); n counts windows and heads.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def factors(q: Tensor, table_h: Tensor, table_w: Tensor, size: tuple[int, int]):
    """rel_h and rel_w as segment_anything makes them, from tables of just this size."""
    as_map = q.unflatten(1, size)
    rows = [_offsets(n, q.device) for n in size]
    table_h, table_w = (t.to(q.dtype) for t in (table_h, table_w))
    rel_h = torch.einsum("bhwc,hkc->bhwk", as_map, table_h[rows[0]])
    rel_w = torch.einsum("bhwc,wkc->bhwk", as_map, table_w[rows[1]])
    return rel_h, rel_w


def _offsets(size: int, device: torch.device) -> Tensor:
    places = torch.arange(size, device=device)
    return places[:, None] - places + size - 1


def eager(q, k, v, rel_h, rel_w, scale):
    logits = (q * scale) @ k.transpose(-2, -1)
    as_maps = logits.view(*rel_h.shape, -1) + rel_h[..., None] + rel_w[..., None, :]
    return as_maps.view(logits.shape).softmax(-1) @ v


def masked(q, k, v, rel_h, rel_w, scale):
    bias = (rel_h[..., None] + rel_w[..., None, :]).reshape(1, len(q), q.shape[1], k.shape[1])
    q, k, v = (t[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)[0]


def augmented(q, k, v, rel_h, rel_w, scale):
    height, width = rel_h.shape[3], rel_w.shape[3]
    at_h, at_w = (torch.eye(n, device=q.device, dtype=q.dtype) for n in (height, width))
    at = torch.cat([at_h.repeat_interleave(width, 0), at_w.repeat(height, 1)], 1)
    head_dim = q.shape[2]
    q = torch.cat([q * scale, rel_h.flatten(1, 2), rel_w.flatten(1, 2)], 2)
    k = torch.cat([k, at.expand(k.shape[0], -1, -1)], 2)
    v = F.pad(v, (0, height + width))  # as wide as q and k, or the fused kernels are not taken
    out = F.scaled_dot_product_attention(*(t[None] for t in (q, k, v)), scale=1.0)[0]
    return out[..., :head_dim]


def without_bias(device: str) -> dict[str, SDPBackend | None]:
    """Ways to attend where there is no bias: torch's choice, on a GPU also each fast kernel."""
    chosen = {"SDPA without bias": None}
    if device == "cuda":
        chosen["flash without bias"] = SDPBackend.FLASH_ATTENTION
        chosen["cuDNN without bias"] = SDPBackend.CUDNN_ATTENTION
    return chosen


def only(kernels: SDPBackend | None):
    return contextlib.nullcontext() if kernels is None else sdpa_kernel(kernels)


@functools.cache
def _flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q, k, v, rel_h, rel_w, scale):
    width = rel_w.shape[3]
    rel_h, rel_w = rel_h.flatten(1, 2), rel_w.flatten(1, 2)

    def score(s, batch, head, i, j):
        return s + rel_h[head, i, j // width] + rel_w[head, i, j % width]

    return _flex()(*(t[None] for t in (q, k, v)), score_mod=score, scale=scale)[0]
