# SPDX-License-Identifier: Apache-2.0
"""conv_experts against the literal recipe in float64: output and every gradient."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget
from draws import DEVICE, drawing

from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import reference

from .cases import NAMES, WHOLE, Case, runnable

FORCED = [
    Case(samples=1, height=height, width=width, depthwise=depthwise, index=(e,))
    for e in range(8)
    for height, width in ((14, 14), (9, 13))
    for depthwise in (False, True)
]
GLOBAL = [
    Case(samples=1, height=64, width=64, depthwise=depthwise, index=(e,))
    for e in range(8)
    for depthwise in (False, True)
]
RANKS = [
    Case(samples=4, height=6, width=5, rank=rank, depthwise=depthwise, ratios=(1, 2, 3, 4))
    for rank in (1, 2, 3, 4, 8, 16)
    for depthwise in (False, True)
]
OTHERS = [
    Case(samples=25),
    Case(samples=25, depthwise=True),
    Case(samples=0),
    Case(samples=1),
    Case(samples=2, ratios=(3,)),
    Case(samples=5, ratios=(4, 4, 11, 10)),
    Case(samples=8, height=1, width=1),
    Case(samples=8, height=2, width=3),
    Case(samples=8, height=1, width=7),
    Case(samples=4, residual=False),
    Case(samples=4, activation="none", index=(1, 2, 5, 0)),
]
DTYPES = [torch.bfloat16, torch.float16]


def check(case, dtype, backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    ours = case.run(dtype, backend, torch.float32)
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    stock = partial(case.run, dtype, "reference", torch.float32)
    exact = partial(case.run, torch.float64, "reference")
    all_within_budget(ours, stock, exact, dtype, NAMES)


@pytest.mark.slow_on_cpu(
    *(f"1x64x64-r3-M8-e{e}" for e in range(7)), "e7-torch", "e7-depthwise-torch"
)
@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize("case", [*FORCED, *GLOBAL, *RANKS, *OTHERS], ids=lambda case: case.id)
def test_float32(case, backend):
    check(case, torch.float32, backend)


@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depthwise", [False, True])
def test_other_dtypes(dtype, depthwise, backend):
    check(Case(samples=8, depthwise=depthwise), dtype, backend)


def test_float64():
    case = Case(samples=8)
    exact = partial(case.run, torch.float64, "reference")
    all_within_budget(case.run(torch.float64, "torch"), exact, exact, torch.float64, NAMES)


@pytest.mark.parametrize("backend", WHOLE)
def test_experts_without_a_sample_get_zero(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    case = Case(samples=2, index=(1, 6))
    _, _, dweight, dbias = case.run(torch.float32, backend)
    idle = torch.tensor([0, 2, 3, 4, 5, 7], device=DEVICE)
    assert not dweight[idle].any() and not dbias[idle].any()
    assert dweight[[1, 6]].all() and dbias[[1, 6]].all()


@pytest.mark.slow_on_cpu("64-64")
@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize("height,width", [(14, 14), (20, 17), (64, 64), (5, 30)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_windows_of_images(height, width, depthwise, backend):
    """Window order over image-order buffers, pads apart; with the balancing loss's gradient."""
    if reason := runnable(backend):
        pytest.skip(reason)
    windows = Windows(2, height, width, 14, 14)
    draw, rank, experts = drawing(3), 3, 8
    index = torch.arange(windows.samples, device=DEVICE) % experts
    weight = 0.4 * draw(experts, rank, 1 if depthwise else rank, 3, 3)
    h, bias = draw(windows.tokens, rank), draw(experts, rank)
    dz, dz_pad = draw(windows.tokens, rank), draw(windows.batch * windows.pads, rank)
    daux, dpool, dgate = draw(), draw(windows.samples, rank), draw(2, rank, experts)

    def literal(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (h, weight, bias)]
        samples = windows.cut(leaves[0])
        out = reference.conv_experts(
            samples, *leaves[1:], index, range(1, 9), groups=rank if depthwise else 1
        )
        z, z_pad = windows.paste(out)
        loss = (z * dz.to(dtype)).sum() + (z_pad * dz_pad.to(dtype)).sum()
        loss = loss + daux.to(dtype) * (samples.sum((1, 2)) * dpool.to(dtype)).sum()
        grads = torch.autograd.grad(loss, leaves)
        return [z, z_pad, *grads, *(daux * dgate).to(dtype)]

    single = [t.float() for t in (h, weight, bias)]
    options = (list(windows), list(range(1, 9)), True, "gelu")
    z, z_pad = torch.ops.samfast.conv_experts_forward(*single, index, *options, backend)
    grads = torch.ops.samfast.conv_experts_backward(
        dz.float(), dz_pad.float(), *single, index, *options, daux.float(), dpool.float(),
        dgate.float(), [True, True], backend,
    )  # fmt: skip
    names = ("z", "z_pad", *NAMES[1:], "dw_gate", "dw_noise")
    ours = [z, z_pad, *grads]
    stock, exact = (partial(literal, t) for t in (torch.float32, torch.float64))
    all_within_budget(ours, stock, exact, torch.float32, names)


@pytest.mark.parametrize("backend", WHOLE)
def test_huge_values_stay_finite(backend):
    """The published combination of experts overflows above 88.7."""
    if reason := runnable(backend):
        pytest.skip(reason)
    case = Case(samples=8)
    (h, weight, bias), dz = case.tensors(torch.float32)
    z = case.call([(h * 1e4).detach().requires_grad_(), weight, bias], backend)
    grads = torch.autograd.grad(z, [weight, bias], dz)
    assert z.abs().max() > 1e4
    assert all(t.isfinite().all() for t in (z, *grads))
