# SPDX-License-Identifier: Apache-2.0
"""The budget sees what kernels get wrong: faults planted in every product and sum."""

import statistics

import pytest
import torch

from instruments import mutations

SINGLE = [pytest.param(case, id=f"{case[0]}-{case[1]}") for case in mutations.cases()]


def check(case):
    """In float32 each fault is seen at nearly every place, at most of them by far."""
    rows = list(mutations.rows(*case, torch.float32))
    assert {row.fault for row in rows} >= {"product in TF32", "product in bfloat16", "1 + 1e-3"}
    for row in rows:
        assert sum(factor > 1 for factor in row.factors) >= 0.9 * len(row.factors), row
        assert statistics.median(row.factors) > 8, row


def test_in_one_operation():
    check(next(case for case in mutations.cases() if case[0] == "task_core"))


@pytest.mark.slow
@pytest.mark.parametrize("case", SINGLE)
def test_in_every_operation(case):
    check(case)


def test_a_right_run_is_none():
    """Nothing planted: far below the budget."""
    name, _, run = next(mutations.cases())
    with mutations.Planted("product in TF32", -1) as planted:
        made = run(torch.float32)
    assert planted.places == 9, name
    exact = lambda: run(torch.float64)  # noqa: E731
    budget = mutations.Budget(lambda: run(torch.float32), exact, torch.float32)
    assert max(budget.shares(made).values()) < 0.5
