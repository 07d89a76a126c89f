# SPDX-License-Identifier: Apache-2.0
"""The branch: what a gradient of base costs, and autocast far from zero."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget, assert_same_dtypes
from draws import DEVICE

from samfast.functional import adapt_former

from .cases import BACKENDS, NAMES, Case


def test_a_base_s_gradient_alone_costs_nothing(monkeypatch):
    leaves, dy = Case().tensors(torch.float32)
    for t in leaves[2:]:
        t.requires_grad_(False)
    leaves[0].requires_grad_(False)

    def refuse(*_):
        raise AssertionError("a gradient nobody wants was made")

    monkeypatch.setattr("samfast.kernels.adapt_former.engine.up_backward", refuse)
    monkeypatch.setattr("samfast.kernels.adapt_former.torch_path.low_backward", refuse)
    (dbase,) = torch.autograd.grad(adapt_former(*leaves), leaves[1], dy)
    assert torch.equal(dbase, dy)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(narrow, backend):
    """The norm sees x as it is, far from zero too; products are narrow, as the stock layers'.

    base as a linear layer leaves it, and as a norm does; the stock result is of the wider dtype.
    """
    for case in (Case(), Case(mean=1e3, spread=0.1)):
        exact = partial(case.run, torch.float64, "literal")
        for base_dtype in (narrow, torch.float32):

            def run(which, case=case, base_dtype=base_dtype):
                leaves, dy = case.tensors(torch.float32)
                given = [leaves[0], leaves[1].to(base_dtype), *leaves[2:]]
                with torch.autocast(DEVICE.type, narrow):
                    y = case.call(given, which)
                assert y.dtype == base_dtype
                return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

            ours = run(backend)
            budget = all_within_budget(ours, partial(run, "literal"), exact, narrow, NAMES)
            assert_same_dtypes(ours, budget)
