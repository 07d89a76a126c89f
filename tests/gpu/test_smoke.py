# SPDX-License-Identifier: Apache-2.0
"""The first tests to run on a GPU: few compiles, every kernel, dtype and way once.

On a CPU values in float32 run in Triton's interpreter, and wait for `make test-slow`.
"""

import copy
from functools import partial

import pytest
import torch
from budgets import all_within_budget
from draws import DEVICE, drawing
from stock_runs import by_reference

from benchmarks.graph import captured
from samfast.counters import counting
from samfast.functional import conv_experts
from samfast.integrations.torchvision import installed
from samfast.kernels._common.budget import Budget
from samfast.kernels.conv_experts.op import supports

from . import planted, proofs, smoke_modules, test_window_attention
from .proofs import CUDA
from .smoke_cases import ROWS

pytestmark = pytest.mark.gpu_smoke

REPEATS = 250 if CUDA else 1


def on_cpu(row, backend, dtype):
    """Whether the interpreter has the time for it; tests/kernels run it in the other dtypes."""
    return backend == "triton" and dtype == torch.float32 and row.way != "sam-map"


VALUES = [
    pytest.param(
        row,
        backend,
        dtype,
        id=f"{row}-{backend}-{str(dtype)[6:]}",
        marks=[] if on_cpu(row, backend, dtype) else [pytest.mark.gpu],
    )
    for row in ROWS
    for backend in row.backends
    for dtype in row.dtypes
]


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(("row", "backend", "dtype"), VALUES)
def test_values(row, backend, dtype):
    """Within the budget of float64, by the kernels that the row names."""
    if reason := proofs.missing(row.operation, backend, dtype):
        pytest.skip(reason)
    ours = row.run(dtype, backend)
    all_within_budget(
        ours, partial(row.run, dtype, "reference"), partial(row.in_float64, dtype), dtype, row.names
    )
    if backend == "triton":
        with counting() as counts:
            row.run(dtype, backend)
        assert set(row.kernels) <= set(counts.launches)


def built(name, dtype):
    if name in smoke_modules.INHERITING and not installed("segment_anything"):
        pytest.skip("segment_anything is not installed; carry its wheel (make carry-gpu)")
    return smoke_modules.call(name, dtype)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("name", smoke_modules.NAMES)
def test_module(name):
    made, x, dy = built(name, torch.float32)
    run = smoke_modules.gradients
    wide, wide_x = copy.deepcopy(made).double(), x.detach().double().requires_grad_()
    exact = by_reference(run, wide, wide_x, dy.double())
    budget = Budget(by_reference(run, made, x, dy), exact, torch.float32)
    names = ["y", "x", *(name for name, _ in made.named_parameters())]
    problems = budget.problems(run(made, x, dy))
    assert not {names[int(place)]: text for place, text in problems.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", smoke_modules.NAMES)
def test_replay(name):
    """A captured step gives the bits of the eager one, from poisoned results."""
    call = built(name, torch.bfloat16)
    expected, made = smoke_modules.gradients(*call), []

    def step():
        made[:] = smoke_modules.gradients(*call)

    replay = captured(step)
    for t in made:
        t.fill_(float("nan"))
    replay()
    assert proofs.same(expected, made)


@pytest.mark.gpu
@pytest.mark.parametrize("name", smoke_modules.NAMES)
def test_another_stream(name):
    call = built(name, torch.bfloat16)
    proofs.another_stream(lambda: smoke_modules.gradients(*call))


def attention():
    """dq reads back the gradients of the factors that its program stored."""
    problem = test_window_attention.problem("windows", torch.bfloat16)
    return lambda: test_window_attention.gradients("windows", *problem)


def norm(rank):
    """The backward of a norm stores n over dn; rows are kept up to rank 8."""
    from samfast.kernels.sam_block import triton_kernels

    tokens, width = (4096, 1280) if CUDA else (8, 32)
    draw = drawing(0, torch.bfloat16)
    dn, x, residual = (draw(tokens, width) for _ in range(3))
    weight, bias, low = draw(width), draw(width), (draw(tokens, rank), draw(rank, width), False)

    def call():
        dx, n, _ = triton_kernels.norm_backward(
            dn.clone(), x, weight, bias, 1e-6, residual, low, True
        )
        return dx, n

    return call


def experts():
    """The backward of a convolution adds to the patches that its program stored."""
    samples, side = (25, 14) if CUDA else (2, 4)
    draw = drawing(0, torch.float32)
    leaves = [draw(samples, side, side, 3), draw(8, 3, 3, 3, 3), draw(8, 3)]
    leaves = [t.requires_grad_() for t in leaves]
    index = torch.arange(samples, device=DEVICE) % 8

    def call():
        z = conv_experts(*leaves, index, range(1, 9), backend="triton")
        return [z, *torch.autograd.grad(z, leaves, torch.ones_like(z))]

    return call


HAZARDS = {
    "relpos_attention": attention,
    "sam_block": partial(norm, 12),
    "sam_block_rows": partial(norm, 4),
    "conv_experts": experts,
}


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("operation", HAZARDS)
def test_global_memory_within_a_program(operation):
    """Scratch memory is NaN before every call: what is read too early is not what it was before."""
    if reason := supports("triton", torch.empty(1, 3, device=DEVICE), torch.empty(8, 3, 3, 3, 3)):
        pytest.skip(reason)
    proofs.same_bits(HAZARDS[operation](), REPEATS, deterministic=True)


@pytest.mark.gpu
def test_repeats_see_a_missing_barrier(tmp_path):
    """Of the four kernels without their barriers at least one gives other bits."""
    seen = []
    for operation, hazard in HAZARDS.items():
        call = hazard()
        expected = [t.clone() for t in call()]
        with planted.planted(operation, tmp_path):
            try:
                proofs.same_bits_as(expected, call, REPEATS)
            except AssertionError:
                seen.append(operation)
    print("a missing barrier was seen in", seen or "no kernel")
    assert seen
