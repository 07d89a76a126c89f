# SPDX-License-Identifier: Apache-2.0
"""The specification of ``lora_linear``: eager PyTorch, any dtype and device, plain autograd."""

import torch.nn.functional as F

from samfast.kernels._common.philox import keep_mask


def lora_linear(x, weight, bias, lora_a, lora_b, scaling, *, dropout=0.0, seed=None, slices=None):
    """y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ; with ``slices`` only those output columns get an update.

    x: (..., D)   weight: (O, D)   lora_a: (R, D)   lora_b: (O, r)
    slices: n column ranges (start, stop) of equal length L; lora_b is then (n·L, r), and lora_a
    holds either one factor shared by all slices (r, D) or one for each (n·r, D).
    """
    y = F.linear(x, weight, bias)
    if dropout > 0.0:
        rows = x.numel() // x.shape[-1]
        keep = keep_mask(seed, rows, x.shape[-1], dropout).view(x.shape)
        x = x * keep / (1.0 - dropout)
    h = F.linear(x, lora_a.to(x.dtype))
    rank = lora_b.shape[1]
    if slices is None:
        return y + scaling * F.linear(h, lora_b.to(x.dtype))
    out = y.clone()
    length = lora_b.shape[0] // len(slices)
    own = lora_a.shape[0] == rank * len(slices)
    for i, (start, stop) in enumerate(slices):
        z = h[..., i * rank : (i + 1) * rank] if own else h
        b = lora_b[i * length : (i + 1) * length].to(x.dtype)
        out[..., start:stop] = y[..., start:stop] + scaling * F.linear(z, b)
    return out
