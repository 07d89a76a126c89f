# SPDX-License-Identifier: Apache-2.0
"""lora_linear against float64: outputs and every gradient, every backend that runs here."""

import dataclasses
from functools import partial

import pytest
import torch
from budgets import all_within_budget
from draws import DEVICE

from samfast.kernels.lora_linear.op import MAX_TRITON_RANK

from .cases import NAMES, Case, runnable

QV = ((0, 16), (32, 48))
AWKWARD = [
    Case(),
    Case(rank=1),
    Case(rank=3, shape=(1, 33)),
    Case(rank=8, shape=(63, 7), out=5),
    Case(rank=16, shape=(2, 341, 20), out=130),
    Case(rank=24, shape=(90, 33), out=72),
    Case(rank=64, shape=(2, 70, 65), out=72),
    Case(slices=QV),
    Case(slices=QV, rank=3, shared=True),
    Case(slices=((0, 16), (16, 32), (32, 48)), rank=8),
    Case(dropout=0.3),
    Case(dropout=0.1, slices=QV, shape=(5, 30)),
    Case(bias=False),
    Case(shape=(0, 7, 33)),
    Case(shape=(33,)),
]
SAM = [
    Case(shape=(2, 14, 14, 192), out=576, rank=4),
    Case(shape=(1, 16, 16, 192), out=576, rank=16, slices=((0, 192), (384, 576))),
    Case(shape=(1, 14, 14, 768), out=192, rank=3),
]


def backend_parameters():
    """(backend, dtype) pairs that run here."""
    parameters = []
    for backend in ("torch", "cpu", "triton"):
        reason = runnable(backend)
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = f"{backend}-{str(dtype).removeprefix('torch.')}"
            parameters.append(pytest.param(backend, dtype, id=name, marks=marks))
    return parameters


@pytest.mark.slow_on_cpu("triton", "torch-float16")
@pytest.mark.parametrize(("backend", "dtype"), backend_parameters())
@pytest.mark.parametrize("case", AWKWARD + SAM, ids=lambda case: case.id)
def test_error_budget(case, backend, dtype):
    stock, exact = (partial(case.run, t, "reference") for t in (dtype, torch.float64))
    if backend == "triton" and case.rank > MAX_TRITON_RANK[dtype.itemsize]:
        with pytest.raises(RuntimeError, match="the widest tile for"):
            case.run(dtype, backend)
        return
    ours = case.run(dtype, backend)
    assert ours[0].dtype == dtype
    all_within_budget(ours, stock, exact, dtype, NAMES)


@pytest.mark.parametrize(("backend", "dtype"), backend_parameters())
def test_float32_adapter_on_a_narrow_base(backend, dtype):
    case = Case(shape=(2, 70, 40), rank=8)
    exact = partial(case.run, torch.float64, "reference")
    stock = partial(case.run, dtype, "reference", torch.float32)
    ours = case.run(dtype, backend, torch.float32)
    assert ours[4].dtype == ours[5].dtype == torch.float32
    all_within_budget(ours, stock, exact, dtype, NAMES)


@pytest.mark.parametrize("case", AWKWARD, ids=lambda case: case.id)
def test_torch_backend_in_float64(case):
    """Nothing is more exact than float64, so whole numbers, whose sums are exact in any order."""
    dropout = 0.5 if case.dropout else 0.0
    case = dataclasses.replace(case, whole=True, scaling=0.75, dropout=dropout)
    exact = case.run(torch.float64, "reference")
    for name, mine, theirs in zip(NAMES, case.run(torch.float64, "torch"), exact, strict=True):
        assert mine.dtype == torch.float64
        assert torch.equal(mine, theirs), name


@pytest.mark.slow_on_cpu("triton-float32", "triton-bfloat16")
@pytest.mark.parametrize(("backend", "dtype"), backend_parameters())
def test_bits_repeat(backend, dtype):
    case = Case(shape=(3, 50, 65), out=96, rank=8, dropout=0.2)
    first = case.run(dtype, backend)
    for _ in range(2 if backend != "triton" or DEVICE.type == "cuda" else 1):
        again = case.run(dtype, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(runnable("cpu") is not None, reason=str(runnable("cpu")))
def test_cpu_bits_do_not_depend_on_the_number_of_threads():
    case = Case(shape=(500, 65), out=96, rank=8)
    threads = torch.get_num_threads()
    outcomes = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        outcomes.append(case.run(torch.float32, "cpu")[4:])
    torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))
