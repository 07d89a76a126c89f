# SPDX-License-Identifier: Apache-2.0
"""The products as operators: gradcheck, opcheck, compile, autocast, memory, what is saved."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budgets import all_within_budget
from torch._subclasses.fake_tensor import FakeTensorMode

from samfast.counters import count, saved_bytes
from samfast.functional import hypercomplex_linear, kronecker_weight
from samfast.kernels.hypercomplex import costs

from ..alike import assert_alike
from .cases import DEVICE, NAMES, Case, runnable

BACKENDS = ("torch", "cpu", "triton", "cuda")
CASE = Case(n=3, rows=4, columns=5, base=True, scaling=0.5)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := runnable(request.param):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_gradcheck(n):
    terms, base = min(n, 3) if n < 16 else 1, n == 3
    case = Case(n=n, rows=1, columns=1, tokens=(2,), terms=terms, base=base, scaling=0.5)
    leaves, _ = case.tensors(torch.float64)

    def call(*given):
        tensors = iter(given)
        return case.call([None if t is None else next(tensors) for t in leaves], "torch")

    assert torch.autograd.gradcheck(call, [t for t in leaves if t is not None])
    rules, weights = leaves[1:3]
    assert torch.autograd.gradcheck(
        lambda *p: kronecker_weight(*p, backend="torch"), (rules, weights)
    )


@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(requires_grad):
    tensors, _ = CASE.tensors(torch.float32)
    x, rules, weights, bias, base = (t.detach().requires_grad_(requires_grad) for t in tensors)
    arguments = (x, rules, weights, bias, base, 0.5, "auto")
    torch.library.opcheck(torch.ops.samfast.hypercomplex_linear, arguments)
    arguments = (x, rules, weights, None, None, 0.5, "torch")
    torch.library.opcheck(torch.ops.samfast.hypercomplex_linear, arguments)
    arguments = (rules, weights, 0.5, torch.float32, "auto")
    torch.library.opcheck(torch.ops.samfast.kronecker_weight, arguments)


@pytest.mark.slow_on_cpu("triton")
def test_opcheck_of_the_backwards(backend):
    """What the fakes promise is what the bodies return, strides too."""
    tensors, dy = CASE.tensors(torch.float32)
    x, rules, weights, _, base = (t.detach() for t in tensors)
    rules, weights = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (rules, weights))
    dh = torch.randn(base.shape, device=DEVICE)
    packet = torch.ops.samfast
    calls = [
        (packet.kronecker_weight_backward, (dh, rules, weights, 0.5, [True, True], backend)),
        (
            packet.hypercomplex_linear_backward,
            (dy, x, rules, weights, base, 0.5, torch.bfloat16, [True] * 5, backend),
        ),
    ]
    for operator, arguments in calls:
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=checks)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments]
            promised = operator(*fakes)
        made = operator(*arguments)
        assert [(t.stride(), t.dtype) for t in promised] == [(t.stride(), t.dtype) for t in made]


def test_compile_fullgraph():
    """Under autocast, forward and backward in one graph, bits as in eager mode."""
    (x, rules, weights, bias, base), dy = CASE.tensors(torch.float32)

    def layer(x):
        return hypercomplex_linear(x, rules, weights, bias, base=base, scaling=0.5)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = [x, rules, weights, bias, base]
    results = []
    for call in (layer, compiled):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = call(x)
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))])
    assert all(torch.equal(e, t) for e, t in zip(*results, strict=True))


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


def test_saves_x_alone():
    """Neither the matrix nor its parts; by what is packed and by what stays alive."""
    (x, rules, weights, bias, base), _ = CASE.tensors(torch.float32)
    known = [rules, weights, bias, base]
    saved = saved_bytes(lambda: CASE.call([x, *known], "auto"), known)
    assert saved.hooks == x.numel() * 4 and saved.living == 0
    for t in (rules, weights, base):
        t.requires_grad_(False)
    saved = saved_bytes(lambda: CASE.call([x, *known], "auto"), known)
    assert (saved.hooks, saved.living) == (0, 0)


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
    if backend == "torch":  # puts cells into place and back; all its products are aten's
        assert counts.total_launches <= 19
        assert counts.flops == sum(s.flops for s in stages) - tokens * outputs
    else:
        assert counts.total_launches == sum(s.launches for s in stages)
        assert counts.flops == sum(s.flops for s in stages if s.product)
    assert counts.largest <= 4 * max(tokens * outputs, outputs * inputs)


def layouts(t):
    """The values of t in slices with NaN in the gaps, transposed, and expanded from the first."""
    gaps = t.new_full((*t.shape[:-1], t.shape[-1] + 5), float("nan"))
    gaps[..., 2:-3] = t
    turned = t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return gaps[..., 2:-3], turned, t[:1].expand_as(t)


@pytest.mark.slow_on_cpu("triton")
def test_odd_memory(backend):
    """Of x, dy and every parameter."""
    tensors, dy = CASE.tensors(torch.float32)
    for i, name in enumerate(("x", "rules", "weights", "bias", "base", "dy")):
        if name == "bias":
            continue
        for odd in layouts((*tensors, dy)[i].detach()):
            given = [t.detach() for t in (*tensors, dy)]
            given[i] = odd
            dense = [t.clone(memory_format=torch.contiguous_format) for t in given]

            def run(values, which):
                leaves = [t.requires_grad_() for t in values[:5]]
                y = CASE.call(leaves, which)
                return [y, *torch.autograd.grad(y, leaves, values[5])]

            exact = partial(run, [t.double() for t in dense], "reference")
            stock = partial(run, dense, "reference")
            all_within_budget(run(given, backend), stock, exact, torch.float32, NAMES)


@pytest.mark.slow_on_cpu("triton")
def test_nothing_is_written_and_bits_repeat(backend):
    tensors, dy = CASE.tensors(torch.float32)
    before = [t.detach().clone() for t in (*tensors, dy)]
    runs = []
    for deterministic in (False, False, True):
        torch.use_deterministic_algorithms(deterministic)  # poisons what is not written
        try:
            y = CASE.call(tensors, backend)
            runs.append([y, *torch.autograd.grad(y, tensors, dy)])
        finally:
            torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    assert all(torch.equal(b, t) for b, t in zip(before, (*tensors, dy), strict=True))


@pytest.mark.slow_on_cpu("triton")
def test_an_empty_batch(backend):
    tensors, dy = Case(n=2, rows=3, columns=4, tokens=(0, 5), base=True).tensors(torch.float32)
    y = CASE.call(tensors, backend)
    assert y.shape == (0, 5, 6)
    assert not any(g.any() for g in torch.autograd.grad(y, tensors, dy))


def test_a_second_derivative_is_refused():
    tensors, _ = CASE.tensors(torch.float32)
    (grad,) = torch.autograd.grad(CASE.call(tensors, "auto").sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
