# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels under the guarded interpreter, in three program orders and far out."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from budgets import all_within_budget

from .cases import FACTOR_NAMES, NAMES, Case, Factors, runnable

if runnable("triton") or torch.cuda.is_available():
    reason = runnable("triton") or "kernels are compiled, not interpreted, beside a GPU"
    pytest.skip(reason, allow_module_level=True)

from guarded import ORDERS, guarded

from samfast.kernels.hypercomplex import triton_kernels

CASES = [
    Case(n=2, rows=13, columns=9, base=True, tokens=(5,)),  # several programs of several tiles
    Case(n=5, rows=1, columns=13, terms=2, tokens=(5,)),  # several chunks of cells
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_order_gives_the_same_bits(case, monkeypatch):
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 3)
    dtype, runs = torch.float16, []
    for order in ORDERS:
        with guarded(order) as guard:
            runs.append(case.run(dtype, "triton", torch.float32))
        assert guard.launches == 4  # H, H again, what dH gives, and the sum
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    stock = partial(case.run, dtype, "reference", torch.float32)
    exact = partial(case.run, torch.float64, "reference")
    all_within_budget(runs[0], stock, exact, dtype, NAMES)


def test_factors_in_every_order():
    case, runs = Factors(n=2, rows=140, columns=29, rank=2, terms=1), []
    for order in ORDERS:
        with guarded(order) as guard:
            runs.append(case.run(torch.float32, "triton"))
        assert guard.launches == 2
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    stock, exact = (partial(case.run, t, "reference") for t in (torch.float32, torch.float64))
    all_within_budget(runs[0], stock, exact, torch.float32, FACTOR_NAMES)


# Offsets beyond 2**31 elements on a CPU: virtual memory of which a few pages are touched.
FAR = """
import torch
torch.manual_seed(0)
from guarded import guarded
from samfast.kernels.hypercomplex import triton_factors, triton_kernels

far = 2**27 + 16  # the last of 17 rows starts beyond 2**31
store = torch.empty(17 * far)
rules, weights, base = torch.randn(1, 1, 1), torch.randn(1, 17, 8), torch.randn(17, 8)

def wide(like, first=0):
    # the same rows, far apart
    return store.as_strided(like.shape, (far, 1), first).copy_(like)

def build(base, h):
    triton_kernels.build_kernel[(2, 1)](
        rules, weights, base, h, 0.5, 1, 1, 17, 8, 136, base.stride(0), h.stride(0), BLOCK_C=1,
        BLOCK_P=128,
    )
    return h

def contract(grad):
    dweights, partial = torch.empty(1, 17, 8), torch.empty(5, 1)
    triton_kernels.contract_kernel[(5,)](
        grad, rules, weights, dweights, partial, 0.5, 1, 1, 17, 8, grad.stride(0), 136, 1,
        ONE=True, BLOCK_I=16, BLOCK_C=16, BLOCK_P=32,
    )
    return torch.cat([dweights.flatten(), partial.flatten()])

def terms(weights):
    h = torch.empty(1, 8)
    triton_kernels.build_kernel[(1, 1)](
        torch.ones(17, 1, 1), weights, None, h, 1.0, 17, 1, 1, 8, weights.stride(0), 8, 8,
        BLOCK_C=1, BLOCK_P=128,
    )
    return h

def sums(partial, stride):
    # the last of 17 programs' shares, of which one column is looked at
    out = torch.empty(1)
    triton_kernels.sum_kernel[(1,)](partial, out, 17, stride, BLOCK_B=32, BLOCK_E=1)
    return out

def factors(a, b):
    triton_factors.factors_kernel[(3,)](
        rules, left, right, a, b, 1, 17, 17, 4, 17, a.stride(0), b.stride(0), 1, BLOCK=256
    )
    return torch.cat([a, b], 1)

def factors_backward(a, b):
    out = torch.empty(1, 1, 1), torch.empty(1, 17, 17), torch.empty(1, 4, 17)
    triton_factors.factors_backward_kernel[(4,)](
        a, b, rules, left, *out, 1, 1, 17, 17, 4, a.stride(0), b.stride(0), 1, 2, BLOCK=256
    )
    return torch.cat([t.flatten() for t in out])

left, right = torch.randn(1, 17, 17), torch.randn(1, 4, 17)
a, b, h = torch.empty(17, 4), torch.empty(17, 17), torch.empty(17, 8)
with guarded(poison=False):
    assert torch.equal(build(wide(base), wide(h, 8)), build(base, h))
    assert torch.equal(contract(wide(base)), contract(base))
    rows = torch.randn(17, 8)
    assert torch.equal(terms(wide(rows)), terms(rows))
    column = torch.randn(17, 1)
    assert torch.equal(sums(wide(column), far), sums(column, 1))
    assert torch.equal(factors(wide(a), wide(b, 32)), factors(a, b))
    a, b = torch.randn(17, 4), torch.randn(17, 17)
    assert torch.equal(factors_backward(wide(a), wide(b, 32)), factors_backward(a, b))
print("equal")
"""


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31():
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    command = [sys.executable, "-c", FAR]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr
