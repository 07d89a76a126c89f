# SPDX-License-Identifier: Apache-2.0
"""The one tolerance rule: twice the stock module's own error, measured against float64.

    error(ours) <= 2 · (error(stock) + eps · max|reference|)    in max-norm and in 2-norm

eps is the machine epsilon of the compute dtype (autocast's where autocast is on).
"""

import torch


def within_budget(ours, stock, reference, dtype: torch.dtype, what: str = "result") -> None:
    """Assert the rule for one tensor. ours, stock: any dtype; reference: float64."""
    assert ours.shape == reference.shape, f"{what}: shape {ours.shape} is not {reference.shape}"
    if reference.numel() == 0:
        return
    eps = torch.finfo(dtype).eps
    scale = eps * reference.abs().max()
    for name, norm in (("max-norm", _max_norm), ("2-norm", _mean_norm)):
        mine = norm(ours.double() - reference)
        allowed = 2.0 * (norm(stock.double() - reference) + scale)
        assert mine <= allowed, f"{what}: {name} error {mine:.3e} is above the budget {allowed:.3e}"


def all_within_budget(ours, stock, reference, dtype, names) -> None:
    for name, mine, theirs, exact in zip(names, ours, stock, reference, strict=True):
        within_budget(mine.detach(), theirs.detach(), exact.detach(), dtype, name)


def _max_norm(t):
    return t.abs().max()


def _mean_norm(t):
    """The 2-norm per element, so that eps · max|reference| is on the same scale."""
    return t.square().mean().sqrt()
