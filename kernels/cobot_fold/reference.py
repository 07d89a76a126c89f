# SPDX-License-Identifier: Apache-2.0
"""COBOT's coefficients and heads as they are written, for any dtype and device.

Slice m sends h through (c_m + γ_m) ⊙ h, c_m = (C P)[:, m], and then through a quaternion layer.
"""

import torch
from torch import Tensor


def quaternion(head: Tensor) -> Tensor:
    """W (V, V) of y = x W; head (4, V/4, V/4), the quarters r, i, j, k."""
    r, i, j, k = head
    rows = [[r, i, j, k], [-i, r, k, -j], [-j, -k, r, i], [-k, j, -i, r]]
    return torch.cat([torch.cat(row, 1) for row in rows])


def cobot_fold(c, p, gammas, heads, factors, biases, first, down):
    """The factors and biases of each layer, with diag(c_m + γ_m) W_m folded in."""
    coefficients = (c[0] @ p).t()  # (slices, V)
    folded, shifts, m = [], [], first
    for layer, (gamma, head, factor) in enumerate(zip(gammas, heads, factors, strict=True)):
        count = len(head)
        own = gamma.view(count, -1)
        ks = [torch.diag(coefficients[m + s] + own[s]) @ quaternion(head[s]) for s in range(count)]
        m += count
        if down:
            folded.append(ks[0].t() @ factor)
            shifts.append(biases[layer] @ ks[0])
        else:
            parts = factor.view(count, -1, factor.shape[1])
            folded.append(torch.cat([f @ k.t() for f, k in zip(parts, ks, strict=True)]))
    return folded, shifts
