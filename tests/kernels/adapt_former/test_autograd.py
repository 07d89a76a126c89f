# SPDX-License-Identifier: Apache-2.0
"""The branch's operators: opcheck, compile, what they save, what they make and never write to."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget, assert_same_dtypes, keep
from layouts import odd_layouts

from samfast.counters import saved_bytes
from samfast.functional import adapt_former
from samfast.kernels._common.budget import Budget

from ..alike import assert_alike
from .cases import BACKENDS, DEVICE, NAMES, Case, runnable

SMALL = Case(shape=(2, 2, 8), bottleneck=3, dropout=0.2)
SLOW = [pytest.mark.slow]
ALL = [True] * 7


def operands(case, dtype, backend, small=None):
    leaves, dy = case.tensors(dtype, small)
    return [*leaves, case.seed, case.eps, case.dropout, dtype, backend], leaves, dy


def test_gradcheck():
    leaves, _ = SMALL.tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: SMALL.call(t, "torch"), leaves)


def skip_what_does_not_run(backend):
    if reason := runnable(backend):
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("backend", "requires_grad"),
    [
        ("torch", True),
        pytest.param("torch", False, marks=SLOW),
        pytest.param("auto", True, marks=SLOW),
        pytest.param("triton", True, marks=SLOW),
    ],
)
def test_opcheck(backend, requires_grad):
    skip_what_does_not_run(backend)
    arguments, leaves, _ = operands(SMALL, torch.float32, backend)
    for t in leaves:
        t.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.samfast.adapt_former, arguments)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float32),
        ("auto", torch.bfloat16),
        ("triton", torch.float16),
        pytest.param("triton", torch.float32, marks=SLOW),
    ],
    ids=str,
)
def test_opcheck_of_the_two_halves(backend, dtype):
    skip_what_does_not_run(backend)
    checks = ("test_schema", "test_faketensor")
    arguments, _, dy = operands(SMALL, dtype, backend, torch.float32)
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    forward = torch.ops.samfast.adapt_former_forward
    torch.library.opcheck(forward, arguments, test_utils=checks)
    _, z = forward(*arguments)
    x, _, *side, _, eps, dropout, kind, _ = arguments
    some = [[i == j for j in range(7)] for i in range(7)]
    for needs in (ALL, *(some if backend == "torch" else ())):
        backward = torch.ops.samfast.adapt_former_backward
        given = (dy, x, z, *side, eps, dropout, kind, backend, needs)
        torch.library.opcheck(backward, given, test_utils=checks)


@pytest.mark.parametrize(
    "case", [SMALL, pytest.param(Case(shape=(2, 2, 3, 8)), marks=SLOW)], ids=lambda case: case.id
)
def test_compile_fullgraph(case):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: case.call(t), fullgraph=True, backend="aot_eager")
    results = []
    for call in (lambda *t: case.call(t), compiled):
        leaves, dy = case.tensors(torch.float32)
        y = call(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_wanted_gradients_are_made(backend):
    """Each alone, with the bits it has beside the others."""
    case = Case(dropout=0.2)
    full = case.run(torch.float32, backend)
    for i, name in enumerate(NAMES[1:]):
        leaves, dy = case.tensors(torch.float32)
        for j, t in enumerate(leaves):
            t.requires_grad_(i == j)
        (grad,) = torch.autograd.grad(case.call(leaves, backend), leaves[i], dy)
        assert_alike(grad, full[1 + i], name)


def test_a_base_s_gradient_alone_costs_nothing(monkeypatch):
    leaves, dy = Case().tensors(torch.float32)
    for t in leaves[2:]:
        t.requires_grad_(False)
    leaves[0].requires_grad_(False)

    def refuse(*_):
        raise AssertionError("a gradient nobody wants was made")

    monkeypatch.setattr("samfast.kernels.adapt_former.op.engine.up_backward", refuse)
    monkeypatch.setattr("samfast.kernels.adapt_former.torch_path.low_backward", refuse)
    (dbase,) = torch.autograd.grad(adapt_former(*leaves), leaves[1], dy)
    assert torch.equal(dbase, dy)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float32), ("auto", torch.bfloat16)], ids=str
)
def test_saved_bytes(backend, dtype):
    """x and z, V numbers a token, by what is passed to autograd and by what is alive."""
    case = Case(dropout=0.2, bottleneck=6)
    leaves, _ = case.tensors(dtype, torch.float32)
    tokens, width = 3 * 5 * 7, dtype.itemsize

    def kept():
        found = saved_bytes(lambda: case.call(leaves, backend), [t for t in leaves[2:]])
        assert found.living == found.hooks - (leaves[0].nbytes if found.hooks else 0)
        return found.hooks

    assert kept() == leaves[0].nbytes + tokens * 6 * width
    for t in leaves:
        t.requires_grad_(False)
    assert kept() == 0
    leaves[7].requires_grad_()
    assert kept() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_memory(backend):
    """Of every input and of the incoming gradient, each in every layout and all at once."""
    case = Case(dropout=0.2)
    leaves, dy = case.tensors(torch.float32)
    stock, exact = (partial(case.run, t, "literal") for t in (torch.float32, torch.float64))
    budget = Budget(stock, exact, torch.float32)
    for odd in zip(*(odd_layouts(t.detach()) for t in (*leaves, dy)), strict=True):
        *odd, odd_dy = odd
        odd = [t.requires_grad_() for t in odd]
        for given, incoming in (
            ([odd[0], odd[1], *leaves[2:]], odd_dy),
            (odd, dy),
            ([leaves[0], *odd[1:]], odd_dy),
        ):
            y = case.call(given, backend)
            assert y.is_contiguous()
            made = [y.detach(), *torch.autograd.grad(y, given, incoming)]
            keep(budget, made, NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded(backend):
    """Stride zero in x and base, and a gradient that is one number seen everywhere."""
    case = Case()
    leaves, _ = case.tensors(torch.float32)
    results = []
    for dense in (True, False):
        same = [t.detach()[:1, :1].expand_as(t) for t in leaves[:2]]
        same = [(t.contiguous() if dense else t).requires_grad_() for t in same]
        y = case.call([*same, *leaves[2:]], backend)
        ones = torch.ones_like(y) if dense else y.new_ones(()).expand_as(y)
        results.append([y, *torch.autograd.grad(y, [*same, *leaves[2:]], ones)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_written_and_bits_repeat(backend):
    """Two backwards through one graph; deterministic mode fills what is not initialised."""
    case = Case(dropout=0.2)
    leaves, dy = case.tensors(torch.float32)
    given = [(t, t.detach().clone(), t._version) for t in (*leaves, dy)]
    y = case.call(leaves, backend)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    again = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for t, before, version in given:
        assert torch.equal(t, before) and t._version == version
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            run = case.run(torch.float32, backend)
            assert all(torch.equal(a, b) for a, b in zip(run, (y, *first), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_double_backward_is_refused():
    leaves, dy = SMALL.tensors(torch.float32)
    y = SMALL.call(leaves)
    (dx,) = torch.autograd.grad(y, leaves[0], dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


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


def test_nothing_wanted_is_no_graph():
    leaves, _ = Case().tensors(torch.float32)
    y = Case().call([t.detach() for t in leaves])
    with torch.no_grad():
        y_off = Case().call(leaves)
    with torch.inference_mode():
        y_inference = Case().call(leaves)
    assert y.grad_fn is None and not y_off.requires_grad
    assert torch.equal(y, y_off) and torch.equal(y, y_inference)
