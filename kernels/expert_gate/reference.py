# SPDX-License-Identifier: Apache-2.0
"""The specification of the gate: noisy top-k choice of an expert, with plain autograd."""

import torch
import torch.nn.functional as F


def expert_gate(h, w_gate, w_noise, noise=None, expert_index=None, coefficient=0.01, top_k=1):
    """Choices (N, k), their weights (N, k) and the balancing loss.

    h: (N, H, W, r)   w_gate, w_noise: (r, M)   noise: (N, M) standard normal, None outside training
    expert_index: (N, k) or None, a choice made by the caller
    loss = coefficient · (CV²(importance) + CV²(load))
    """
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    experts = w_gate.shape[1]
    g = h.mean((1, 2))
    clean = logits = g @ w_gate.to(h.dtype)
    if noise is not None:
        sigma = F.softplus(g @ w_noise.to(h.dtype)) + 0.01
        logits = clean + noise * sigma
    order = logits.argsort(dim=1, descending=True, stable=True)  # the first of equals first
    order = order[:, : top_k + 1]
    top = logits.gather(1, order)
    index = order[:, :top_k] if expert_index is None else expert_index
    weights = logits.gather(1, index).softmax(1)
    gates = torch.zeros_like(logits).scatter(1, index, weights)
    if noise is not None and top_k < experts:
        lowest_in, highest_out = top[:, top_k - 1 : top_k], top[:, top_k : top_k + 1]
        inside = logits > highest_out
        bar = torch.where(inside, highest_out, lowest_in)
        load = torch.special.ndtr((clean - bar) / sigma).sum(0)
    else:
        load = (gates > 0).to(h.dtype).sum(0)
    loss = coefficient * (squared_variation(gates.sum(0)) + squared_variation(load))
    return index, weights, loss


def squared_variation(v):
    """CV² = unbiased variance / (mean² + 1e-10), 0 for one value."""
    if v.numel() == 1:
        return v.new_zeros(())
    return v.var() / (v.mean().square() + 1e-10)
