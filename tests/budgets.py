# SPDX-License-Identifier: Apache-2.0
"""Assertions for the one tolerance rule of the tests (kernels/_common/budget.py)."""

import torch

from samfast.kernels._common.budget import over_budget


def within_budget(ours, stock, reference, dtype: torch.dtype, what: str = "result") -> None:
    """Assert the rule for one tensor. ours, stock: any dtype; reference: float64."""
    problem = over_budget(ours.detach(), stock.detach(), reference.detach(), dtype)
    assert problem is None, f"{what}: {problem}"


def all_within_budget(ours, stock, reference, dtype, names) -> None:
    """The rule for outputs and gradients, each under its name."""
    for name, mine, theirs, exact in zip(names, ours, stock, reference, strict=True):
        within_budget(mine, theirs, exact, dtype, name)
