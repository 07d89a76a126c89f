# SPDX-License-Identifier: Apache-2.0
"""The products: autocast, launches of the wanted gradients, costs and an empty batch."""

import pytest
import torch
import torch.nn.functional as F
from budgets import all_within_budget
from draws import DEVICE
from marks import CUDA

from samfast.counters import count
from samfast.functional import hypercomplex_linear
from samfast.kernels.hypercomplex import costs

from ..alike import assert_alike
from .cases import CASE, NAMES, Case, runnable

BACKENDS = ("torch", "cpu", "triton", CUDA)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := runnable(request.param):
        pytest.skip(reason)
    return request.param


@pytest.mark.slow_on_cpu("triton")
def test_the_backward_s_fake_knows_the_bias_s_dtype(backend):
    tensors, dy = CASE.tensors(torch.float32)
    x, rules, weights, _, base = (t.detach() for t in tensors)
    arguments = (dy, x, rules, weights, base, 0.5, torch.bfloat16, [True] * 5, backend)
    operator = torch.ops.samfast.hypercomplex_linear_backward
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    assert operator(*arguments)[3].dtype == torch.bfloat16


@pytest.mark.slow_on_cpu("triton")
def test_autocast_is_as_good_as_a_stock_linear_layer(backend):
    dtype = torch.float16 if backend == "triton" and DEVICE.type == "cpu" else torch.bfloat16
    (x, rules, weights, bias, _), dy = Case(n=4, rows=12, columns=9).tensors(torch.float32)
    wanted = [x, rules, weights, bias]
    with torch.autocast(DEVICE.type, dtype):
        ours = hypercomplex_linear(*wanted, backend=backend)

    def stock():
        h = sum(torch.kron(a, s) for a, s in zip(rules, weights, strict=True))
        with torch.autocast(DEVICE.type, dtype):
            y = F.linear(x, h, bias)
        return [y, *torch.autograd.grad(y, wanted, dy.to(dtype))]

    def exact():
        leaves = Case(n=4, rows=12, columns=9).tensors(torch.float64)[0][:4]
        y = hypercomplex_linear(*leaves, backend="reference")
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype).double())]

    grads = torch.autograd.grad(ours, wanted, dy.to(dtype))
    assert ours.dtype == dtype and [g.dtype for g in grads] == [torch.float32] * 4
    all_within_budget([ours, *grads], stock, exact, dtype, NAMES[:5])


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 2), (1, 3)])
def test_only_the_wanted_gradients_are_made(wanted, backend):
    tensors, dy = CASE.tensors(torch.float32)
    full = torch.autograd.grad(CASE.call(tensors, backend), tensors, dy)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    y = CASE.call(some, backend)
    grads = torch.autograd.grad(y, [some[i] for i in wanted], dy, retain_graph=True)
    for i, grad in zip(wanted, grads, strict=True):
        assert_alike(grad, full[i], NAMES[i + 1])
    if backend == "triton":  # H is built again for dx alone, and dH is not looked at for it
        call = count(
            lambda: torch.autograd.grad(y, [some[i] for i in wanted], dy, retain_graph=True)
        )
        assert call.launches["build_kernel"] == (0 in wanted)
        assert call.launches["contract_kernel"] == (1 in wanted or 2 in wanted)
        assert call.launches["sum_kernel"] == (1 in wanted)


@pytest.mark.slow_on_cpu("triton")
def test_counts_are_those_of_the_costs(backend):
    """Forward: H and the product. Backward: H, dx, dH and its two passes. No sync."""
    case = Case(n=4, rows=8, columns=8, tokens=(96,))
    (x, rules, weights, bias, _), dy = case.tensors(torch.float32)
    tokens, inputs, outputs = 96, 32, 32

    def call():
        y = hypercomplex_linear(x, rules, weights, bias, backend=backend)
        return torch.autograd.grad(y, [x, rules, weights, bias], dy)

    counts = count(call)
    stages = costs.stages(tokens, inputs, outputs, 4, 4)
    assert counts.total_syncs == 0
    if backend in ("torch", "triton"):  # db's sum is aten's
        assert counts.flops == sum(s.flops for s in stages) - tokens * outputs
    else:  # native operators do not tell
        assert counts.flops == sum(s.flops for s in stages if s.product)
    if backend == "torch":  # puts cells into place and back
        assert counts.total_launches <= 19
    else:
        assert counts.total_launches == sum(s.launches for s in stages)
    assert counts.largest <= 4 * max(tokens * outputs, outputs * inputs)


@pytest.mark.slow_on_cpu("triton")
def test_an_empty_batch(backend):
    tensors, dy = Case(n=2, rows=3, columns=4, tokens=(0, 5), base=True).tensors(torch.float32)
    y = CASE.call(tensors, backend)
    assert y.shape == (0, 5, 6)
    assert not any(g.any() for g in torch.autograd.grad(y, tensors, dy))
