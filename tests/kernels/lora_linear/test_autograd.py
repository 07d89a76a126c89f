# SPDX-License-Identifier: Apache-2.0
"""lora_linear as an operator: gradcheck, opcheck, compile, autocast, checkpointing, memory."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budgets import all_within_budget
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from samfast.functional import lora_linear
from samfast.kernels._common.middle import IDENTITY

from ..alike import assert_alike
from .cases import DEVICE, NAMES, Case, runnable

BACKENDS = ["torch", "cpu", "triton"]


def leaves(requires_grad=True, dtype=torch.float32):
    tensors, dy = Case(shape=(3, 5, 12), out=18, rank=2).tensors(dtype)
    return [t.detach().requires_grad_(requires_grad) for t in tensors], dy


@pytest.mark.parametrize(
    "case",
    [
        Case(shape=(2, 3, 6), out=9, rank=2),
        Case(shape=(2, 6), out=9, rank=2, slices=((0, 3), (6, 9)), dropout=0.3),
        Case(shape=(2, 6), out=9, rank=2, slices=((0, 3), (6, 9)), shared=True),
    ],
    ids=lambda case: case.id,
)
def test_gradcheck(case):
    tensors, _ = case.tensors(torch.float64)
    seed = torch.tensor([5], device=DEVICE)

    def call(*inputs):
        options = dict(dropout=case.dropout, seed=seed, slices=case.slices, backend="torch")
        return lora_linear(*inputs, 0.5, **options)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.slow_on_cpu("torch")
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_opcheck(requires_grad, backend):
    (x, weight, bias, a, b), _ = leaves(requires_grad)
    arguments = (x, weight, bias, a, b, [], None, 0.5, 0.0, IDENTITY, [], [], False, backend)
    torch.library.opcheck(torch.ops.samfast.lora_linear, arguments)
    arguments = (*arguments[:6], torch.tensor([7], device=DEVICE), 0.5, 0.3, *arguments[9:])
    torch.library.opcheck(torch.ops.samfast.lora_linear, arguments)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_two_halves(backend):
    """With factors in a transposed layout: what the fakes promise is what the bodies return."""
    if reason := runnable(backend):
        pytest.skip(reason)
    (x, weight, bias, a, b), dy = leaves(requires_grad=False)
    a, b = (t.t().contiguous().t() for t in (a, b))
    options = (0.5, 0.0, IDENTITY, [], [], False)
    forward = (x, weight, bias, a, b, [], None, *options, backend)
    y, z, *_ = torch.ops.samfast.lora_linear_forward(*forward)
    inputs = (dy, None, None, x, weight, a, b, z, [], [], None)
    backward = (*inputs, *options, [True] * 5, torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.samfast.lora_linear_forward, forward, test_utils=checks)
    backward = (*backward, backend)
    torch.library.opcheck(torch.ops.samfast.lora_linear_backward, backward, test_utils=checks)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in backward]
        promised = torch.ops.samfast.lora_linear_backward(*fakes)
    made = torch.ops.samfast.lora_linear_backward(*backward)
    assert [t.stride() for t in promised] == [t.stride() for t in made]
    assert y.shape == dy.shape


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_compile_fullgraph(autocast):
    (x, weight, bias, a, b), dy = leaves()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        eager = lora_linear(x, weight, bias, a, b, 0.5)
        traced = compiled(x, weight, bias, a, b, 0.5)
    dy = dy.to(eager.dtype)
    expected = torch.autograd.grad(eager, [x, a, b], dy)
    actual = torch.autograd.grad(traced, [x, a, b], dy)
    assert torch.equal(eager, traced)
    assert all(torch.equal(e, t) for e, t in zip(expected, actual, strict=True))


@pytest.mark.slow_on_cpu("True")
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


def test_a_backward_inside_autocast_changes_nothing():
    (x, weight, bias, a, b), dy = leaves()
    expected = torch.autograd.grad(lora_linear(x, weight, bias, a, b, 0.5), [x, a, b], dy)
    y = lora_linear(x, weight, bias, a, b, 0.5)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        actual = torch.autograd.grad(y, [x, a, b], dy)
    assert all(torch.equal(e, t) for e, t in zip(expected, actual, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_redraws_the_same_dropout(reentrant):
    (x, weight, bias, a, b), dy = leaves()

    def layer(x):
        return lora_linear(x, weight, bias, a, b, 0.5, dropout=0.4)

    torch.manual_seed(3)
    expected = torch.autograd.grad(layer(x), [x], dy)
    torch.manual_seed(3)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    a.grad = x.grad = None
    y.backward(dy)
    assert torch.equal(x.grad, expected[0])


def saved_bytes(call):
    """Bytes autograd keeps, each storage once, parameters excluded by the caller's list."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return kept, y


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_saves_only_x_and_h(dropout):
    (x, weight, bias, a, b), _ = leaves()
    weight.requires_grad_(False)
    kept, y = saved_bytes(lambda: lora_linear(x, weight, bias, a, b, 0.5, dropout=dropout))
    known = {t.untyped_storage().data_ptr() for t in (weight, bias, a, b)}
    sizes = sorted(size for pointer, size in kept.items() if pointer not in known)
    h = x.shape[0] * x.shape[1] * a.shape[0] * x.element_size()
    seed = [8] if dropout else []
    assert sizes == sorted([*seed, h, x.numel() * x.element_size()])
    del y


def test_frozen_adapters_save_no_activation():
    (x, weight, bias, a, b), _ = leaves(requires_grad=False)
    x.requires_grad_()
    kept, y = saved_bytes(lambda: lora_linear(x, weight, bias, a, b, 0.5))
    known = {t.untyped_storage().data_ptr() for t in (weight, bias, a, b)}
    assert set(kept) <= known
    del y


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(0,), (3,), (4,), (1, 2), (2, 4)])
def test_only_the_wanted_gradients_are_made(backend, wanted):
    if reason := runnable(backend):
        pytest.skip(reason)
    everything, dy = leaves()
    full = torch.autograd.grad(lora_linear(*everything, 0.5, backend=backend), everything, dy)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(everything)]
    y = lora_linear(*some, 0.5, backend=backend)
    grads = torch.autograd.grad(y, [some[i] for i in wanted], dy)
    for i, grad in zip(wanted, grads, strict=True):
        assert_alike(grad, full[i], NAMES[i + 1])


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_memory(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    (x, weight, bias, a, b), dy = leaves()

    def grads(x, dy, name=backend):
        y = lora_linear(x, weight, bias, a, b, 0.5, backend=name)
        return [y, *torch.autograd.grad(y, [x, a, b], dy)]

    gaps = torch.full((*x.shape[:-1], 40), float("nan"), device=DEVICE)
    gaps[..., 3:15] = x.detach()
    gaps = gaps[..., 3:15].requires_grad_()
    permuted = x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    expanded = x.detach()[:1].expand_as(x).requires_grad_()
    layouts = [(gaps, dy), (permuted, dy), (expanded, dy)]
    layouts += [(x, dy.permute(2, 1, 0).contiguous().permute(2, 1, 0)), (x, dy[:1].expand_as(dy))]
    for odd_x, odd_dy in layouts:
        dense = odd_x.detach().clone(memory_format=torch.contiguous_format), odd_dy.contiguous()

        def literal(dtype, dense=dense):
            *given, dy = (t.detach().to(dtype) for t in (dense[0], weight, bias, a, b, dense[1]))
            x, _, _, *adapter = leaves = [t.requires_grad_() for t in given]
            y = lora_linear(*leaves, 0.5, backend="reference")
            return [y, *torch.autograd.grad(y, [x, *adapter], dy)]

        stock, exact = (partial(literal, t) for t in (torch.float32, torch.float64))
        names = ["y", "dx", "dlora_a", "dlora_b"]
        all_within_budget(grads(odd_x, odd_dy), stock, exact, torch.float32, names)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_incoming_gradients_are_not_written(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    tensors, dy = leaves()
    before = [t.detach().clone() for t in (*tensors, dy)]
    lora_linear(*tensors, 0.5, dropout=0.2, backend=backend).backward(dy)
    assert all(torch.equal(b, t) for b, t in zip(before, (*tensors, dy), strict=True))


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


def test_double_backward_is_refused():
    (x, weight, bias, a, b), _ = leaves()
    y = lora_linear(x, weight, bias, a, b, 0.5)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
