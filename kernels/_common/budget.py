# SPDX-License-Identifier: Apache-2.0
"""The error budget: twice the stock module's own error, measured against float64.

    error(ours) ≤ 2 · (error(stock) + eps · max|reference|)    in max-norm and in 2-norm

eps is the machine epsilon of the compute dtype (autocast's where autocast is on). The 2-norm is
taken per element, so that eps · max|reference| is on its scale.
"""

import torch
from torch import Tensor

_NORMS = {
    "max-norm": lambda t: t.abs().max(),
    "2-norm": lambda t: t.square().mean().sqrt(),
}


def over_budget(ours: Tensor, stock: Tensor, reference: Tensor, dtype: torch.dtype) -> str | None:
    """None when ``ours`` keeps the budget, or a sentence. reference: float64, all of one shape."""
    if ours.shape != reference.shape:
        return f"shape {tuple(ours.shape)} is not {tuple(reference.shape)}"
    if reference.numel() == 0:
        return None
    scale = torch.finfo(dtype).eps * reference.abs().max()
    for name, norm in _NORMS.items():
        mine = norm(ours.double() - reference)
        allowed = 2.0 * (norm(stock.double() - reference) + scale)
        if not mine <= allowed:
            return f"{name} error {mine:.3e} is above the budget {allowed:.3e}"
    return None
