# SPDX-License-Identifier: Apache-2.0
"""The specification: sums of Kronecker products as PyTorch writes them, with plain autograd."""

import torch
import torch.nn.functional as F


def kronecker_weight(rules, weights, scaling=1.0):
    """s · Σ_i rules_i ⊗ weights_i: (n · P, n · Q).

    rules: (m, n, n)   weights: (m, P, Q)
    """
    return scaling * sum(kron(a, s) for a, s in zip(rules, weights, strict=True))


def kron(a, b):
    """torch.kron, which refuses some strides."""
    return torch.kron(*(t.clone(memory_format=torch.contiguous_format) for t in (a, b)))


def hypercomplex_linear(x, rules, weights, bias=None, base=None, scaling=1.0):
    """x (base + s · Σ_i rules_i ⊗ weights_i)ᵀ + bias, the matrix rounded once to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = kronecker_weight(rules.to(wide), weights.to(wide), scaling)
    if base is not None:
        weight = base.to(wide) + weight
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def kronecker_factors(rules, left, right):
    """lora_a (m · n · k, n · Q) and lora_b (n · P, m · n · k) with
    lora_b @ lora_a = Σ_i rules_i ⊗ (left_i right_iᵀ).

    rules: (m, n, n)   left: (m, P, k)   right: (m, Q, k)
    A bottleneck column belongs to a term i, a column q of its rule and a rank j, in this order.
    """
    eye = torch.eye(rules.shape[1], dtype=right.dtype, device=right.device)
    lora_a = torch.cat([kron(eye, v.t()) for v in right])
    lora_b = torch.cat([kron(a, u) for a, u in zip(rules, left, strict=True)], dim=1)
    return lora_a, lora_b
