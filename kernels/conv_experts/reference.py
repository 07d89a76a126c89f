# SPDX-License-Identifier: Apache-2.0
"""The specification of ``conv_experts``: the published recipe, literally, with plain autograd."""

import torch
import torch.nn.functional as F


def conv_experts(
    h, weight, bias, expert_index, ratios, *, residual=True, activation="gelu", groups=1
):
    """Sample n goes through expert e = expert_index[n]: enlarge, convolve, activate, shrink.

    h: (N, H, W, r)   weight: (M, r, r / groups, 3, 3)   bias: (M, r)   expert_index: (N,)
    out: (N, H, W, r) = residual · h + shrink(act(conv(enlarge(h, ratios[e]); weight[e], bias[e])))
    """
    out = h.clone() if residual else torch.zeros_like(h)
    for m, ratio in enumerate(ratios):
        chosen = (expert_index == m).nonzero().squeeze(1)
        if chosen.numel() == 0:
            continue
        update = expert(
            h[chosen], weight[m].to(h.dtype), bias[m].to(h.dtype), ratio, activation, groups
        )
        out = out.index_add(0, chosen, update)
    return out


def expert(h, weight, bias, ratio, activation="gelu", groups=1):
    """One expert on all samples. Bicubic as torch's: corners not aligned, no antialiasing."""
    size = h.shape[1:3]
    u = h.permute(0, 3, 1, 2)
    if ratio > 1:
        u = F.interpolate(u, scale_factor=ratio, mode="bicubic")
    v = F.conv2d(u, weight, bias, padding=1, groups=groups)
    if activation == "gelu":
        v = F.gelu(v)
    if ratio > 1:
        v = F.interpolate(v, size=size, mode="bicubic")
    return v.permute(0, 2, 3, 1)
