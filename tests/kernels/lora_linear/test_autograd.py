# SPDX-License-Identifier: Apache-2.0
"""lora_linear next to stock layers: autocast and infinity; and ranks that change."""

import pytest
import torch
import torch.nn.functional as F
from budgets import all_within_budget
from draws import DEVICE

from samfast.functional import lora_linear

from .cases import NAMES, Case, runnable

BACKENDS = ["torch", "cpu", "triton"]


def leaves():
    return Case(shape=(3, 5, 12), out=18, rank=2).tensors(torch.float32)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("shared", [True, False])
def test_compile_slices_of_a_rank_that_changes(shared):
    """The width of lora_b is a symbol there, the rows of lora_a, a Parameter, a number."""
    slices = ((0, 20), (40, 60))
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    for rank in (3, 5):
        case = Case(shape=(4, 30), out=60, rank=rank, slices=slices, shared=shared)
        (*leaves, b), _ = case.tensors(torch.float32)
        leaves[3] = torch.nn.Parameter(leaves[3].detach())
        torch._dynamo.maybe_mark_dynamic(b, 1)
        made = compiled(*leaves, b, 0.5, slices=slices)
        assert torch.equal(made, lora_linear(*leaves, b, 0.5, slices=slices))


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_as_good_as_a_stock_linear_layer(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    case = Case(shape=(4, 30, 40), out=64, rank=4, scaling=2.0)
    (x, weight, bias, a, b), dy = case.tensors(torch.float32)
    dy = dy.to(dtype)
    with torch.autocast(DEVICE.type, dtype):
        ours = lora_linear(x, weight, bias, a, b, case.scaling, backend=backend)

    def stock():
        with torch.autocast(DEVICE.type, dtype):
            y = F.linear(x, weight, bias) + case.scaling * F.linear(F.linear(x, a), b)
        return [y, *torch.autograd.grad(y, wanted, dy)]

    wanted = [x, weight, bias, a, b]
    assert ours.dtype == dtype
    grads = torch.autograd.grad(ours, wanted, dy)
    assert [g.dtype for g in grads] == [torch.float32] * 5

    def exact():
        leaves, _ = case.tensors(torch.float64)
        y = lora_linear(*leaves, case.scaling, backend="reference")
        return [y, *torch.autograd.grad(y, leaves, dy.double())]

    all_within_budget([ours, *grads], stock, exact, dtype, NAMES)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_spreads_as_in_a_stock_layer(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    (x, weight, bias, a, b), dy = leaves()
    with torch.no_grad():
        x[-1, -1, 0] = float("inf")
        dy[-1, -1, 0] = float("inf")
    outcome = []
    for name in ("reference", backend):
        y = lora_linear(x, weight, bias, a, b, 0.5, backend=name)
        outcome.append([y, *torch.autograd.grad(y, [x, a, b], dy)])
    for stock, ours in zip(*outcome, strict=True):
        assert torch.equal(stock.isfinite(), ours.isfinite())
        assert torch.equal(stock.isnan(), ours.isnan())
