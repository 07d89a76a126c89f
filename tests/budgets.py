# SPDX-License-Identifier: Apache-2.0
"""Assertions for the one tolerance rule of the tests (kernels/_common/budget.py).

``stock`` and ``exact`` are functions that compute what they give, so that a comparison which is
above the budget at first can ask for other roundings. Where they hold random numbers, these are
drawn from the same state of torch's generator at each call.
"""

import torch
from torch import Tensor

from samfast.kernels._common.budget import Budget


def within_budget(ours: Tensor, stock, exact, dtype: torch.dtype, what: str = "result") -> None:
    """Assert the rule for one tensor."""
    all_within_budget([ours], stock, exact, dtype, [what])


def all_within_budget(ours, stock, exact, dtype: torch.dtype, names=(), some=False) -> Budget:
    """The rule for outputs and gradients; names: of those that are a sequence.

    some: ``ours`` is a dict that holds only some of them
    """
    budget = Budget(stock, exact, dtype)
    keep(budget, ours, names, some)
    return budget


def keep(budget: Budget, ours, names=(), some=False) -> None:
    """The rule, where one budget judges several results."""
    names = dict(zip(map(str, range(len(ours))), names, strict=True)) if names else {}
    problems = budget.problems(ours, some).items()
    assert not problems, "; ".join(f"{names.get(key, key)}: {text}" for key, text in problems)


def assert_same_dtypes(ours, budget: Budget) -> None:
    """As the stock module's results."""
    ours = list(ours.values() if isinstance(ours, dict) else ours)
    assert [t.dtype for t in ours] == [t.dtype for t in budget.stock.values()]
