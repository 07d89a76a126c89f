# SPDX-License-Identifier: Apache-2.0
"""The block as one operator against the literal block: values, gradients, three memory modes."""

import dataclasses
from functools import partial

import pytest
import torch
from budgets import all_within_budget, assert_same_dtypes, keep, within_budget
from layouts import odd_layouts

from samfast.kernels._common.budget import Budget

from .cases import BACKENDS, Case, runnable

CASES = (
    Case(),
    Case(window=0),
    Case(window=14),
    Case(batch=3, height=8, width=4),
    Case(batch=3, height=1, width=1),
    Case(batch=0),
    Case(adapters=()),
    Case(bias=False),
    Case(adapters=("qkv",), sliced=True),
    Case(adapters=("proj", "lin1"), window=0),
    Case(dropout=0.3),
    Case(dropout=0.3, sliced=True, window=0),
    Case(experts=True),
    Case(experts=True, batch=3, window=0),
    Case(experts=True, adapters=("qkv", "lin2"), dropout=0.3),
    Case(experts=True, bias=False, adapters=("qkv",)),
    Case(batch=0, experts=True),
)
SOME = (Case(), Case(window=0, sliced=True, dropout=0.3), Case(experts=True))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(case, backend, dtype, small=None):
    stock = partial(case.run, dtype, "reference", small)
    exact = partial(case.run, torch.float64, "reference")
    ours = case.run(dtype, backend, small)
    budget = all_within_budget(ours, stock, exact, dtype)
    assert list(ours) == list(budget.exact)
    assert_same_dtypes(ours, budget)


@pytest.mark.slow_on_cpu("auto-float16", "auto-bfloat16", "torch-float16")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_budget(case, backend, dtype):
    check(case, backend, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float64_is_exact(case):
    exact = partial(case.run, torch.float64, "reference")
    all_within_budget(case.run(torch.float64, "torch"), exact, exact, torch.float64)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["balanced", "minimal"])
def test_memory_modes_give_the_same_bits(memory, backend, case):
    """What is computed again meets the same noise and the same dropout."""
    for dtype in (torch.float32, torch.bfloat16):
        kept = case.run(dtype, backend)
        again = dataclasses.replace(case, memory=memory).run(dtype, backend)
        for name, value in kept.items():
            assert torch.equal(value, again[name]), f"{name} in {dtype}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_the_same_bits_again(case, backend):
    """Deterministic mode fills what is not initialised with NaN."""
    first = case.run(torch.float32, backend)
    torch.use_deterministic_algorithms(True)
    try:
        for memory in ("fast", "balanced", "minimal"):
            again = dataclasses.replace(case, memory=memory).run(torch.float32, backend)
            assert all(torch.equal(value, again[name]) for name, value in first.items())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow_on_cpu("auto")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["fast", "balanced", "minimal"])
def test_odd_memory(memory, backend):
    """x and the incoming gradient in every layout give the same bits; of the parameters' layouts
    the library's products take note, within the budget."""
    case = Case(experts=True, memory=memory)
    x, tensors, dy = case.tensors(torch.float32)
    named = [i for i, name in enumerate(case.names) if name]

    def run(x, tensors, dy):
        y, (loss,) = case.call(x, tensors, backend)
        total = (y * dy).sum() + 30 * loss
        return [y, *torch.autograd.grad(total, [x, *(tensors[i] for i in named)])]

    expected = run(x, tensors, dy)
    given = [t.detach() for t in (x, *(tensors[i] for i in named), dy)]
    stock, exact = (partial(case.run, t, "reference") for t in (torch.float32, torch.float64))
    budget = Budget(stock, exact, torch.float32)
    for odd_x, *odd, odd_dy in zip(*(odd_layouts(t) for t in given), strict=True):
        odd_x = odd_x.requires_grad_()
        made = run(odd_x, tensors, odd_dy)
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
        changed = list(tensors)
        for i, t in zip(named, odd, strict=True):
            changed[i] = t.requires_grad_()
        made = run(odd_x, changed, odd_dy)
        names = ["y", "dx", *(case.names[i] for i in named)]
        keep(budget, dict(zip(names, made, strict=True)), some=True)  # all but the loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_maps_and_gradients(backend):
    """Stride zero in x, and a gradient that is one number seen everywhere."""
    case = Case()
    x, tensors, _ = case.tensors(torch.float32)
    same = x.detach()[:1, :1].expand_as(x)
    dense = same.contiguous().requires_grad_()
    y, _ = case.call(dense, tensors, backend)
    (expected,) = torch.autograd.grad(y, dense, torch.ones_like(y))
    same = same.requires_grad_()
    y_expanded, _ = case.call(same, tensors, backend)
    (dx,) = torch.autograd.grad(y_expanded.sum(), same)
    assert torch.equal(y_expanded, y) and torch.equal(dx, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["fast", "minimal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_far_from_zero_and_constant_rows(dtype, memory, backend):
    """Their variance is a small difference of large numbers, or nothing but eps."""
    for change in (lambda x: 1e3 + 0.1 * x, lambda x: 0 * x + 5, lambda x: 0 * x):
        case = Case(memory=memory)

        def run(kind, name, case=case, change=change):
            x, tensors, dy = case.tensors(kind)
            x = change(x.detach().double()).to(dtype).to(kind).requires_grad_()
            y, _ = case.call(x, tensors, name)
            return [y, *torch.autograd.grad(y, [x, tensors[0], tensors[8]], dy)]

        ours = run(dtype, backend)
        assert all(t.isfinite().all() for t in ours)
        stock, exact = (partial(run, t, "reference") for t in (dtype, torch.float64))
        all_within_budget(ours, stock, exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["fast", "balanced", "minimal"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_not_finite_spreads_as_in_the_reference(value, memory, backend):
    """One number of one image, and one of its gradient."""
    case = Case(window=0, memory=memory)
    for place in ("x", "dy"):
        results = []
        for name in (backend, "reference"):
            x, tensors, dy = case.tensors(torch.float32)
            with torch.no_grad():
                (x if place == "x" else dy).view(-1)[-3] = value
            y, _ = case.call(x, tensors, name)
            leaves = [x, *(t for t, n in zip(tensors, case.names, strict=True) if n)]
            results.append([y, *torch.autograd.grad(y, leaves, dy)])
        for ours, stock in zip(*results, strict=True):
            assert torch.equal(ours.isfinite(), stock.isfinite())
        assert results[0][1][0].isfinite().all() and not results[0][1][1].isfinite().all()


def test_tables_biases_and_norms_of_another_dtype():
    """float32 beside a bfloat16 stream, as trained ones are; products are rounded alike."""
    case = Case(adapters=("qkv", "lin2"), bias=False)
    exact = partial(case.run, torch.float64, "reference")
    ours = case.run(torch.bfloat16, "auto", torch.float32)
    alike = partial(case.run, torch.bfloat16, "reference")
    for name, value in ours.items():
        small = name not in ("y", "dx") and "weight" not in name.partition(".")[2]
        assert value.dtype == (torch.float32 if small else torch.bfloat16), name
    all_within_budget(ours, alike, exact, torch.bfloat16)


def test_images_do_not_see_each_other():
    case = Case()
    x, tensors, _ = case.tensors(torch.float64)
    alone = torch.cat([case.call(image[None], tensors, "torch")[0] for image in x])
    both = lambda: case.call(x, tensors, "reference")[0]  # noqa: E731
    within_budget(alone, both, both, torch.float64)


@pytest.mark.gpu  # the interpreter has cases of its own
@pytest.mark.skipif(runnable("triton") is not None, reason=str(runnable("triton")))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_triton(case, dtype):
    check(case, "triton", dtype)
