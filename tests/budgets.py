# SPDX-License-Identifier: Apache-2.0
"""Assertions for the one tolerance rule of the tests (kernels/_common/budget.py).

How exact the stock module is in one number is luck: sums of random roundings may all but cancel.
So where a tensor has few numbers, a comparison may go on to more draws of the inputs, as many as
give FEW numbers together, and take the stock module's largest error. Large tensors have one draw.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from samfast.kernels._common.budget import over_budget

FEW = 64


def within_budget(
    ours: Tensor,
    stock: Tensor,
    reference: Tensor,
    dtype: torch.dtype,
    what: str = "result",
    redraw: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    least: int = 1,
) -> None:
    """Assert the rule for one tensor. ours, stock: any dtype; reference: float64.

    redraw(i): (stock, reference) of draw i of the inputs, all of one distribution; asked for draws
        1, 2, … where draw 0, the one given, is above the budget
    least: draws of large tensors too, of a model in which few roundings make all their errors
    """
    ours, reference = ours.detach(), reference.detach()
    problem = over_budget(ours, stock.detach(), reference, dtype)
    if problem is not None and redraw is not None:
        # Equal ones, as where all tokens have one gradient, are one: so are their errors.
        numbers = len(reference[reference != 0].float().unique())
        for i in range(1, max(least, math.ceil(FEW / max(numbers, 1)))):
            other, exact = (t.detach().double() for t in redraw(i))
            if over_budget(ours, reference + (other - exact), reference, dtype) is None:
                return
    assert problem is None, f"{what}: {problem}"


def all_within_budget(ours, stock, reference, dtype, names, redraw=None, least=1) -> None:
    """The rule for outputs and gradients, each under its name; redraw(i): all of a draw."""
    draws = redraw and functools.cache(redraw)
    for i, (name, mine, theirs, exact) in enumerate(
        zip(names, ours, stock, reference, strict=True)
    ):
        again = draws and (lambda draw, i=i: tuple(part[i] for part in draws(draw)))
        within_budget(mine, theirs, exact, dtype, name, again, least)
