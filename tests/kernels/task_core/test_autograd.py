# SPDX-License-Identifier: Apache-2.0
"""The products in a layer: values, compile, launches, memory and an empty batch."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget
from draws import DEVICE

from samfast.counters import count
from samfast.functional import task_cores
from samfast.kernels.lora_linear.op import low_rank_linear
from samfast.kernels.task_core import middle_key
from samfast.kernels.task_core.op import core_backend

from .cases import BACKENDS, CASE, NAMES, Case, runnable


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := runnable(request.param):
        pytest.skip(reason)
    return request.param


def layer(x, weight, lora_a, lora_b, cores, factors, task, backend="auto"):
    """Two layers with one operation for the cores of both."""
    for m in task_cores(cores, factors, backend=backend):
        x, _, _ = low_rank_linear(
            x, weight, None, lora_a, lora_b, 0.5, middle=middle_key(backend), params=[m, task],
            backend="torch" if backend == "cuda" else backend,
        )  # fmt: skip
    return x


def layer_tensors(dtype=torch.float32):
    """Small whole numbers, so that every sum is exact."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(6, 10, 12), (12, 12), (8, 12), (12, 5), (8, 5, 3), (8, 5, 3), (4, 3), (4, 3)]
    made = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]
    made = [(0.6 * t).round().to(DEVICE, dtype).requires_grad_() for t in made]
    x, weight, a, b, *cores = made
    weight.requires_grad_(False)
    return [x, weight, a, b, cores[:2], cores[2:]]


def layer_leaves(tensors):
    x, _, a, b, cores, factors = tensors
    return [x, a, b, *cores, *factors]


def literal(x, weight, a, b, cores, factors, task):
    for core, factor in zip(cores, factors, strict=True):
        m = torch.einsum("abv,tv->tab", core, factor)
        z = torch.cat([h @ m[t] for h, t in zip((x @ a.t()).chunk(len(task)), task, strict=True)])
        x = x @ weight.t() + 0.5 * z @ b.t()
    return x


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("task", [[1], [0, 1, 2], [3, 0, 0, 3, 1, 1]], ids=str)
def test_middle_map(task, backend):
    """In the engine, with every gradient; the same tasks for rows of one entry, and of each."""
    given = torch.tensor(task, device=DEVICE)
    results = []
    for dtype, call in (
        (torch.float32, lambda *t: layer(*t, given, backend)),
        (torch.float64, lambda *t: literal(*t, task)),
    ):
        tensors = layer_tensors(dtype)
        y = call(*tensors)
        results.append([y, *torch.autograd.grad(y, layer_leaves(tensors), torch.ones_like(y))])
    assert all(torch.equal(ours.double(), exact) for ours, exact in zip(*results, strict=True))


@pytest.mark.slow_on_cpu
def test_compile_fullgraph():
    """Forward and backward in one graph, bits as in eager mode."""
    tensors, task = layer_tensors(), torch.tensor([2, 0, 1], device=DEVICE)
    leaves, results = layer_leaves(tensors), []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(*tensors, task)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(torch.equal(e, t) for e, t in zip(*results, strict=True))


@pytest.mark.slow_on_cpu("triton")
def test_launches(backend):
    """Product 1 + 1, cores 2 + 3 whatever the number of layers; no host sync."""
    (h, core, factor), dz = CASE.tensors(torch.float32)
    rows, m = h.detach().reshape(36, 6), task_cores([core], [factor], backend=backend)[0].detach()
    operators, task = torch.ops.samfast, CASE.given()
    forward = count(lambda: operators.task_core_product_forward(rows, m, task, backend))
    arguments = dz.reshape(36, 5), rows, m, task, [True, True], backend
    backward = count(lambda: operators.task_core_product_backward(*arguments))
    cores = [core.detach().clone().requires_grad_() for _ in range(5)]
    factors = [factor.detach().clone().requires_grad_() for _ in range(5)]
    fold = count(lambda: task_cores(cores, factors, backend=backend))
    made = task_cores(cores, factors, backend=backend)
    grads = [torch.randn_like(m) for m in made]
    back = count(lambda: torch.autograd.grad(made, [*cores, *factors], grads, retain_graph=True))
    counts = [forward, backward, fold, back]
    assert [c.total_syncs for c in counts] == [0] * 4
    if backend != "torch":
        assert [c.total_launches for c in counts] == [1, 1, 2, 3]


@pytest.mark.slow_on_cpu("triton")
def test_nothing_as_wide_as_the_update_is_made(backend):
    """The largest tensor of a layer is y, however many tasks there are."""
    tensors, task = layer_tensors(), torch.tensor([1], device=DEVICE)
    leaves = layer_leaves(tensors)

    def call():
        y = layer(*tensors, task, backend)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    x, parts = tensors[0], task_cores(*tensors[4:], backend=backend)[0].shape[0]
    assert count(call).largest <= max(4 * x.numel(), 4 * 2 * parts * 4 * 8 * 5)


def layouts(t):
    """The values of t in slices with NaN in the gaps, transposed, and expanded from the first."""
    gaps = t.new_full((*t.shape[:-1], t.shape[-1] + 5), float("nan"))
    gaps[..., 2:-3] = t
    turned = t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return gaps[..., 2:-3], turned, t[:1].expand_as(t)


@pytest.mark.slow_on_cpu("triton")
def test_odd_memory(backend):
    """Of h, both parameters and dz: the bits of the same values in dense memory; of torch's
    products, which may read other layouts in another order, the budget."""
    tensors, dz = CASE.tensors(torch.float32)
    for i in range(4):
        for odd in layouts((*tensors, dz)[i].detach()):
            given = [t.detach() for t in (*tensors, dz)]
            given[i] = odd
            dense = [t.clone(memory_format=torch.contiguous_format) for t in given]

            def run(tensors, which, dtype=torch.float32):
                *leaves, incoming = (t.to(dtype) for t in tensors)
                z = CASE.call([t.requires_grad_() for t in leaves], which)
                return [z, *torch.autograd.grad(z, leaves, incoming)]

            ours = run(given, backend)
            if backend != "torch":
                pairs = zip(ours, run(dense, backend), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
                continue
            stock = partial(run, dense, "reference")
            exact = partial(stock, torch.float64)
            all_within_budget(ours, stock, exact, torch.float32, NAMES)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("task", [1, (0, 1, 2), ()], ids=str)
def test_an_empty_batch(task, backend):
    case = Case(shape=(0, 5), task=task)
    leaves, dz = case.tensors(torch.float32)
    for which in (backend, "reference"):
        z = case.call(leaves, which)
        assert z.shape == (0, 5, 5)
        assert not any(g.any() for g in torch.autograd.grad(z, leaves, dz))


def test_which_backend_is_told():
    (h, core, _), _ = CASE.tensors(torch.float32)
    assert core_backend("torch", h, core[..., 0]) == "torch"
    expected = "cpu" if runnable("cpu") is None else "torch"
    if DEVICE.type == "cpu":
        assert core_backend("auto", h, core[..., 0]) == expected
        assert core_backend("auto", h.double(), core[..., 0]) == "torch"
