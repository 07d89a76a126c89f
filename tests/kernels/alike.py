# SPDX-License-Identifier: Apache-2.0
"""Results of calls that ask for different things."""

from functools import partial

import torch
from budgets import within_budget
from torch import Tensor


def assert_alike(some: Tensor, every: Tensor, what: str = "result") -> None:
    """The same bits; beside a GPU, where a kernel is compiled for what is wanted, in the budget."""
    if some.is_cuda:
        exact = partial(torch.mul, every.double(), 1.0)  # which is rounded, and so is the result
        within_budget(some, every, exact, every.dtype, what)
    else:
        assert some.equal(every), what
