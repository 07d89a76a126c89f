# SPDX-License-Identifier: Apache-2.0
"""The budget over several draws: luck of the stock module is no failure, a larger error is one."""

import pytest
import torch
from budgets import FEW, all_within_budget, within_budget

EPS = torch.finfo(torch.float32).eps
EXACT = torch.ones(1, dtype=torch.float64)


def draws(errors, asked=None):
    """redraw(i) whose stock module is errors[i] beside what is exact, then ever exact."""

    def redraw(i):
        if asked is not None:
            asked.append(i)
        exact = EXACT * (1 + i)
        return exact + (errors[i] if i < len(errors) else 0.0), exact

    return redraw


def test_the_luck_of_one_draw_is_no_failure():
    """Errors of 6 eps beside a stock module that has 0 and, in another draw, 4."""
    ours = EXACT + 6 * EPS
    with pytest.raises(AssertionError, match="dp: max-norm error"):
        within_budget(ours, EXACT, EXACT, torch.float32, "dp")
    within_budget(ours, EXACT, EXACT, torch.float32, "dp", draws([0, 0, 0, 4 * EPS]))


def test_more_than_twice_the_largest_error_fails():
    asked, ours = [], EXACT + 11 * EPS  # above 2 * (4 + 1)
    with pytest.raises(AssertionError, match="dp: max-norm error"):
        redraw = draws([0, 2 * EPS, 4 * EPS], asked)
        within_budget(ours, EXACT, EXACT, torch.float32, "dp", redraw)
    assert asked == list(range(1, FEW))


def test_neither_errors_nor_draws_without_end():
    """NaN in a draw excuses nothing; a large tensor has one, unless more are asked for."""
    with pytest.raises(AssertionError):
        redraw = draws([0] + [float("nan")] * FEW)
        within_budget(EXACT + 6 * EPS, EXACT, EXACT, torch.float32, "dp", redraw)
    large = torch.arange(1, 1 + FEW, dtype=torch.float64)
    repeated = EXACT.expand(FEW)  # one number all the same
    for exact, least, last in (
        (large, 1, 1),
        (large, 3, 3),
        (0 * EXACT, 1, FEW),
        (repeated, 1, FEW),
    ):
        asked = []
        with pytest.raises(AssertionError):
            redraw = draws([], asked)
            within_budget(exact + 999 * EPS, exact, exact, torch.float32, "dp", redraw, least)
        assert asked == list(range(1, last))


def test_each_name_asks_for_its_own_part():
    """And a draw runs once for all of them."""
    runs = []

    def redraw(i):
        runs.append(i)
        exact = [EXACT, 3 * EXACT]
        return [exact[0], exact[1] + 4 * EPS], exact

    ours, exact = [EXACT, EXACT + 6 * EPS], [EXACT, EXACT]
    all_within_budget(ours, exact, exact, torch.float32, ["a", "b"], redraw)
    with pytest.raises(AssertionError, match="a: "):
        all_within_budget(ours[::-1], exact, exact, torch.float32, ["a", "b"], redraw)
    assert runs == [1, *range(1, FEW)]
