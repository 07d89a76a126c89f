# SPDX-License-Identifier: Apache-2.0
"""The two passes in aten calls, for any device: H from rules and weights, and dH back to both.

Seen as n · n cells of P × Q positions each, H is one small product: (n², m) · (m, P·Q).
"""

import torch


def build(rules, weights, base, scaling, dtype):
    """base + s · Σ_i rules_i ⊗ weights_i in ``dtype``, (n · P, n · Q), rounded once."""
    (terms, n, _), (_, rows, columns) = rules.shape, weights.shape
    wide = torch.promote_types(dtype, torch.float32)
    mixing = rules.to(wide).reshape(terms, n * n).t()
    cells = torch.mm(mixing, weights.to(wide).reshape(terms, rows * columns)) * scaling
    h = cells.view(n, n, rows, columns).transpose(1, 2).reshape(n * rows, n * columns)
    if base is not None:
        h = h + base.to(wide)
    return h.to(dtype)


def contract(grad, rules, weights, scaling, needs):
    """drules and dweights from dH (n · P, n · Q), of the parameters' dtypes; None unless needed.

    drules_i[p, q] = s · Σ_ab dH[pP + a, qQ + b] weights_i[a, b]
    dweights_i[a, b] = s · Σ_pq rules_i[p, q] dH[pP + a, qQ + b]
    """
    need_rules, need_weights = needs
    (terms, n, _), (_, rows, columns) = rules.shape, weights.shape
    wide = torch.promote_types(grad.dtype, torch.float32)
    cells = grad.to(wide).view(n, rows, n, columns).transpose(1, 2).reshape(n * n, rows * columns)
    drules = dweights = None
    if need_rules:
        # by rows and then over rows: one product over all positions would round more
        of_rows = torch.bmm(
            weights.to(wide).transpose(0, 1), cells.view(n * n, rows, columns).permute(1, 2, 0)
        )
        drules = (of_rows.sum(0) * scaling).view(rules.shape).to(rules.dtype)
    if need_weights:
        mixing = rules.to(wide).reshape(terms, n * n)
        dweights = (torch.mm(mixing, cells) * scaling).view(weights.shape).to(weights.dtype)
    return drules, dweights
