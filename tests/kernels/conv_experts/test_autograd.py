# SPDX-License-Identifier: Apache-2.0
"""conv_experts as an operator: gradcheck, opcheck, compile, memory and what it saves."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget

from samfast.counters import saved_bytes
from samfast.functional import conv_experts

from ..alike import assert_alike
from .cases import BACKENDS, DEVICE, NAMES, Case, runnable

SMALL = Case(samples=2, height=3, width=5, rank=2, ratios=(1, 3))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("ratios", [(1, 2), (3, 4), (5, 8)], ids=str)
def test_gradcheck_where_every_pixel_is_at_a_border(ratios, depthwise):
    case = Case(
        samples=2, height=2, width=3, rank=2, ratios=ratios, depthwise=depthwise, index=(0, 1)
    )
    leaves, _ = case.tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: case.call(t, "torch"), leaves)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_opcheck(requires_grad, backend):
    (h, weight, bias), _ = SMALL.tensors(torch.float32)
    h = h.detach().reshape(-1, 2).requires_grad_(requires_grad)
    options = ([2, 3, 5, 3, 5], [1, 3], True, "gelu", backend)
    arguments = (h, weight.detach(), bias.detach(), SMALL.choices(), *options)
    torch.library.opcheck(torch.ops.samfast.conv_experts, arguments)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_two_halves(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    (h, weight, bias), dz = SMALL.tensors(torch.float32)
    h, weight, bias = h.detach().reshape(-1, 2), weight.detach(), bias.detach()
    options = ([1, 5, 6, 3, 5], [1, 3], True, "gelu")
    index = torch.tensor([0, 1, 1, 0], device=DEVICE)
    forward = (h, weight, bias, index, *options, backend)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.samfast.conv_experts_forward, forward, test_utils=checks)
    balance = (torch.ones((), device=DEVICE), h.new_ones(4, 2), h.new_ones(2, 2, 2))
    backward = (dz.reshape(-1, 2), None, h, weight, bias, index, *options)
    for rest in ((*balance, [True, True]), (None, None, None, [True, False])):
        torch.library.opcheck(
            torch.ops.samfast.conv_experts_backward, (*backward, *rest, backend), test_utils=checks
        )


def test_compile_fullgraph():
    leaves, dz = SMALL.tensors(torch.float32)
    index = SMALL.choices()

    def call(*tensors):
        return conv_experts(*tensors, index, SMALL.ratios)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, traced = call(*leaves), compiled(*leaves)
    expected = torch.autograd.grad(eager, leaves, dz)
    actual = torch.autograd.grad(traced, leaves, dz)
    assert torch.equal(eager, traced)
    assert all(torch.equal(e, t) for e, t in zip(expected, actual, strict=True))


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_wanted_gradients_are_made(backend, wanted):
    if reason := runnable(backend):
        pytest.skip(reason)
    full = SMALL.run(torch.float32, backend)
    leaves, dz = SMALL.tensors(torch.float32)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
    z = SMALL.call(some, backend)
    grads = torch.autograd.grad(z, [some[i] for i in wanted], dz)
    for i, grad in zip(wanted, grads, strict=True):
        assert_alike(grad, full[i + 1])


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_memory(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    (h, weight, bias), dz = SMALL.tensors(torch.float32)
    gaps = torch.full((2, 3, 5, 9), float("nan"), device=DEVICE)
    gaps[..., 4:6] = h.detach()
    layouts = [
        (gaps[..., 4:6], dz),
        (h.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), dz),
        (h.detach()[:1].expand_as(h), dz),
        (h.detach(), dz[:, :1].expand_as(dz)),
        (h.detach(), dz.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)),
    ]
    factors = [t.detach().mT.contiguous().mT for t in (weight, bias)]
    for odd_h, odd_dz in layouts:

        def run(name, dtype, odd_h=odd_h, odd_dz=odd_dz):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (odd_h, *factors)]
            z = SMALL.call(leaves, name)
            return [z, *torch.autograd.grad(z, leaves, odd_dz.to(z.dtype))]

        ours = run(backend, torch.float32)
        stock, exact = (partial(run, "reference", t) for t in (torch.float32, torch.float64))
        all_within_budget(ours, stock, exact, torch.float32, NAMES)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_written_and_bits_repeat(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    leaves, dz = SMALL.tensors(torch.float32)
    before = [t.detach().clone() for t in (*leaves, dz)]
    runs = []
    for _ in range(3):
        z = SMALL.call(leaves, backend)
        runs.append([z, *torch.autograd.grad(z, leaves, dz)])
    assert all(torch.equal(b, t) for b, t in zip(before, (*leaves, dz), strict=True))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_saves_h_and_the_choices():
    (h, weight, bias), _ = SMALL.tensors(torch.float32)
    index = SMALL.choices()
    saved = saved_bytes(
        lambda: conv_experts(h, weight, bias, index, SMALL.ratios), [h, weight, bias, index]
    )
    assert saved.hooks == 0


def test_double_backward_is_refused():
    leaves, dz = SMALL.tensors(torch.float32)
    z = SMALL.call(leaves, "auto")
    (dh,) = torch.autograd.grad(z, leaves[0], dz.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()
