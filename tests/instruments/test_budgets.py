# SPDX-License-Identifier: Apache-2.0
"""The budget: luck is not a failure, a larger error is one, and NaN excuses nothing."""

import pytest
import torch
from budgets import all_within_budget, keep, within_budget

from samfast.kernels._common.budget import ROUNDINGS, Budget

EPS = torch.finfo(torch.float32).eps
EXACT = torch.ones(1, dtype=torch.float64)


def after(*errors):
    """A stock module whose runs are that far from one, and then exact; ``asked`` counts them."""

    def run():
        run.asked += 1
        error = errors[run.asked - 1] if run.asked <= len(errors) else 0.0
        return EXACT.float() + error

    run.asked = 0
    return run


def test_the_luck_of_one_run_is_no_failure():
    """6 eps off, where the stock module is exact and, in another order of its sums, 4 eps off."""
    ours = EXACT.float() + 6 * EPS
    with pytest.raises(AssertionError, match=r"dp: max-norm error 7\.153e-07 is .* of the budget"):
        within_budget(ours, after(), EXACT, torch.float32, "dp")
    within_budget(ours, after(0, 0, 0, 4 * EPS), EXACT, torch.float32, "dp")


def test_more_than_twice_the_largest_error_fails():
    stock = after(0, 2 * EPS, 4 * EPS)
    with pytest.raises(AssertionError, match="max-norm error"):
        within_budget(EXACT.float() + 10 * EPS, stock, EXACT, torch.float32)
    assert stock.asked == ROUNDINGS


def test_what_is_within_a_few_roundings_asks_for_no_more():
    stock = after(4 * EPS)
    within_budget(EXACT.float() + 6 * EPS, stock, EXACT, torch.float32)
    assert stock.asked == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_excuses_nothing(value):
    with pytest.raises(AssertionError, match="max-norm error"):
        within_budget(EXACT + 6 * EPS, after(*[value] * ROUNDINGS), EXACT, torch.float32)
    with pytest.raises(AssertionError, match=r"max-norm error (nan|inf)"):
        within_budget(EXACT * value, after(), EXACT, torch.float32)


def test_the_2_norm_sees_what_the_max_norm_does_not():
    """Every number off by what the stock module's worst number is."""
    exact = torch.ones(1000, dtype=torch.float64)
    stock = exact.float()
    stock[0] += 100 * EPS
    with pytest.raises(AssertionError, match="2-norm error"):
        within_budget(exact.float() + 100 * EPS, stock, exact, torch.float32)


def test_the_least_error_is_that_of_its_precision():
    """Of sums, and of the result in its own dtype: both where the stock module makes none."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).double()
    ones = torch.ones(512, 1, dtype=torch.float64)
    exact = x @ ones

    def share(off, dtype, kind):
        ours = (exact * (1 + off)).to(kind)
        return Budget(exact.to(kind).double(), lambda: x @ ones, dtype).shares([ours])["0"]

    assert share(1e-7, torch.float32, torch.float32) < 1 < share(1e-5, torch.float32, torch.float32)
    assert (
        share(1e-16, torch.float64, torch.float64) < 1 < share(1e-14, torch.float64, torch.float64)
    )
    stock = exact.bfloat16()
    all_within_budget([exact.bfloat16()], stock, lambda: x @ ones, torch.bfloat16)


def test_functions_find_the_same_random_numbers_and_leave_the_callers():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    stock, exact = (lambda: torch.randn(9, 9).sum(1)), (lambda: torch.randn(9, 9).double().sum(1))
    budget = Budget(stock, exact, torch.float32)
    ours = budget.stock["0"] + 100
    assert budget.problems([ours]) and not budget.problems([budget.exact["0"]])
    assert torch.equal(torch.randn(3), expected)


def test_results_by_name():
    exact = {"a": EXACT, "b": 3 * EXACT}
    budget = Budget({"a": EXACT.float(), "b": 3 * EXACT.float()}, exact, torch.float32)
    keep(budget, {"b": 3 * EXACT}, some=True)
    with pytest.raises(AssertionError, match="expected the results a, b, got b"):
        keep(budget, {"b": 3 * EXACT})
    with pytest.raises(AssertionError, match="b: max-norm error"):
        keep(budget, {"a": EXACT, "b": EXACT})
    with pytest.raises(AssertionError, match="expected the results a, b, got c"):
        keep(budget, {"c": EXACT}, some=True)
    with pytest.raises(AssertionError, match="expected the results 0, 1, got 0"):
        all_within_budget([EXACT], [EXACT] * 2, [EXACT] * 2, torch.float32)
    with pytest.raises(AssertionError, match=r"result: shape \(2,\) is not \(1,\)"):
        within_budget(EXACT.expand(2), EXACT, EXACT, torch.float32)


def test_what_is_exact_is_in_float64():
    with pytest.raises(AssertionError, match=r"exact results in float64, got \{torch.float32\}"):
        within_budget(EXACT.float(), EXACT.float(), EXACT.float(), torch.float32)


def test_the_luck_of_one_rounding_of_the_result_is_no_failure():
    """A number next to one of float16, where ours is as far off as float16 rounds it."""
    exact = EXACT * (1 + 1e-6)
    within_budget((exact + 2.0**-11).float(), exact.half(), exact, torch.float16)
    with pytest.raises(AssertionError, match="max-norm error"):
        within_budget((exact + 2.0**-9).float(), exact.half(), exact, torch.float16)


def test_results_without_numbers():
    none = torch.empty(0, 3)
    within_budget(none, none, none.double(), torch.float32)
