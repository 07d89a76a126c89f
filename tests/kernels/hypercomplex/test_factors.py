# SPDX-License-Identifier: Apache-2.0
"""kronecker_factors: a sum of Kronecker products of low rank as LoRA's two factors."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget
from draws import DEVICE

from samfast.counters import count, saved_bytes
from samfast.functional import kronecker_weight
from samfast.kernels.hypercomplex import kronecker_factors
from samfast.kernels.hypercomplex.factors import factors_backend

from .cases import FACTOR_NAMES, Factors, runnable

CASES = [
    Factors(n=2, rows=7, columns=31, rank=3),
    Factors(n=3, rows=1, columns=5),
    Factors(n=4, rows=12, columns=40),
    Factors(n=8, rows=3, columns=2, rank=2, terms=3),
    Factors(n=16, rows=2, columns=3, terms=2),
    Factors(n=3, rows=300, columns=4, terms=1, rank=2),
]


@pytest.fixture(params=("torch", "triton"))
def backend(request):
    if reason := runnable(request.param):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_their_product_is_the_sum_of_kronecker_products(case):
    (rules, left, right), _ = case.tensors(torch.float64)
    with torch.no_grad():
        rules, left, right = ((3 * t).round() for t in (rules, left, right))
        expected = kronecker_weight(rules, left @ right.mT, backend="reference")
        for backend in ("reference", "torch"):
            lora_a, lora_b = kronecker_factors(rules, left, right, backend)
            assert torch.equal(lora_b @ lora_a, expected)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values(case, dtype, backend):
    ours = case.run(dtype, backend)
    stock, exact = (partial(case.run, t, "reference") for t in (dtype, torch.float64))
    all_within_budget(ours, stock, exact, dtype, FACTOR_NAMES)
    assert {t.dtype for t in ours} == {dtype}


def test_launches_and_what_is_saved(backend):
    case = Factors(n=2, rows=24, columns=16)
    leaves, incoming = case.tensors(torch.float32)
    saved = saved_bytes(lambda: kronecker_factors(*leaves, backend), leaves)
    assert (saved.hooks, saved.living) == (0, 0)
    forward = count(lambda: kronecker_factors(*leaves, backend))
    made = kronecker_factors(*leaves, backend)
    backward = count(lambda: torch.autograd.grad(made, leaves, incoming, retain_graph=True))
    most = (1, 1) if backend == "triton" else (4, 6)
    assert forward.total_launches <= most[0] and backward.total_launches <= most[1]
    assert forward.total_syncs == backward.total_syncs == 0


def test_a_factor_that_is_not_used(backend):
    leaves, (da, db) = Factors(n=2).tensors(torch.float32)
    lora_a, lora_b = kronecker_factors(*leaves, backend)
    full = torch.autograd.grad((lora_a, lora_b), leaves, (da, db), retain_graph=True)
    drules, dleft, dright = torch.autograd.grad(
        lora_b, leaves, db, allow_unused=True, retain_graph=True
    )
    assert torch.equal(drules, full[0]) and torch.equal(dleft, full[1]) and dright is None
    drules, dleft, dright = torch.autograd.grad(lora_a, leaves, da, allow_unused=True)
    assert torch.equal(dright, full[2]) and drules is None and dleft is None


def test_odd_memory_and_bits(backend):
    leaves, incoming = Factors(n=2, rank=2).tensors(torch.float32)
    full = torch.autograd.grad(kronecker_factors(*leaves, backend), leaves, incoming)
    turned = [
        t.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for t in (*leaves, *incoming)
    ]
    inputs = [t.requires_grad_() for t in turned[:3]]
    torch.use_deterministic_algorithms(True)  # poisons what is not written
    try:
        made = kronecker_factors(*inputs, backend)
        grads = torch.autograd.grad(made, inputs, turned[3:])
    finally:
        torch.use_deterministic_algorithms(False)
    expected = kronecker_factors(*leaves, backend)
    assert all(torch.equal(a, b) for a, b in zip((*made, *grads), (*expected, *full), strict=True))


def test_native_backends_leave_the_factors_to_others():
    assert factors_backend("cpu", torch.device("cpu"), torch.float32) == "torch"
    assert factors_backend("auto", torch.device("cpu"), torch.float64) == "torch"
    if DEVICE.type == "cpu" and runnable("triton") is None:
        assert factors_backend("cuda", torch.device("cpu"), torch.float32) == "triton"
    made = kronecker_factors(
        torch.zeros(1, 2, 2), torch.zeros(1, 3, 1), torch.zeros(1, 4, 1), "cpu"
    )
    assert [tuple(t.shape) for t in made] == [(2, 8), (6, 2)]
