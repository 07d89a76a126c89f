# SPDX-License-Identifier: Apache-2.0
"""Every backend against float64: result and each gradient, under the budget."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget
from draws import DEVICE, drawing

from samfast.functional import task_core, task_cores
from samfast.kernels.task_core import torch_path

from .cases import BACKENDS, NAMES, Case, literal, runnable

CASES = [
    Case(),  # one task
    Case(shape=(6, 5), task=(0, 1, 2)),  # all of them
    Case(task=(2, 0, 0)),  # tasks in no order, one of them not there
    Case(shape=(4, 3), tasks=2, task=(1, 0, 1, 1)),  # a task for each sample
    Case(shape=(2, 70), ranks=(32, 32, 4), task=(2, 0)),
    Case(shape=(3, 65), ranks=(64, 16, 1), tasks=1, task=(0, 0, 0)),
    Case(shape=(2, 33), ranks=(1, 64, 17), tasks=5, task=(4, 1)),
    Case(shape=(5,), ranks=(3, 1, 2), task=2),
]
INTERPRETED = (1, 3, 6)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := runnable(request.param):
        pytest.skip(reason)
    return request.param


def check(case, dtype, backend):
    """In the dtype throughout, and with parameters that stay float32 beside a narrow h."""
    for parameters in {dtype, torch.float32}:
        ours = case.run(dtype, backend, parameters)
        assert [t.dtype for t in ours] == [dtype, dtype, parameters, parameters]
        stock, exact = (
            partial(literal, case, dtype, parameters),
            partial(literal, case, torch.float64),
        )
        all_within_budget(ours, stock, exact, dtype, NAMES)


@pytest.mark.gpu("triton")  # interpreted in a test of its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values(case, dtype, backend):
    check(case, dtype, backend)


@pytest.mark.slow_on_cpu(but=["2x33x1x64x17-of5-t41-torch.float32"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16],
    ids=str,
)
@pytest.mark.parametrize(
    "case",
    [
        case if i in INTERPRETED else pytest.param(case, marks=pytest.mark.slow)
        for i, case in enumerate(CASES)
    ],
    ids=lambda case: case.id,
)
def test_interpreted(case, dtype):
    """The Triton kernels where no GPU is."""
    if reason := runnable("triton"):
        pytest.skip(reason)
    check(case, dtype, "triton")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_reference(case):
    """The specification is the formula, in its gradients too."""
    exact = partial(literal, case, torch.float64)
    all_within_budget(case.run(torch.float64, "reference"), exact, exact, torch.float64, NAMES)


def test_mixed_tasks_are_each_tasks_own(backend):
    """A batch of several tasks gives the bits that batches of one task give."""
    case = Case(shape=(4, 9), task=(2, 0, 1, 2))
    (h, core, factor), _ = case.tensors(torch.float32)
    z = case.call((h, core, factor), backend)
    for i, task in enumerate(case.task):
        assert torch.equal(z[i], task_core(h[i : i + 1], core, factor, task, backend=backend)[0])


def test_windows_are_rows_of_their_image(backend):
    """With 25 windows an image, in the order of images, one task an image is one a window."""
    leaves, _ = Case(shape=(3 * 25, 2, 2), ranks=(4, 4, 2)).tensors(torch.float32)
    h, core, factor = ((3 * t).round() for t in leaves)  # so that every sum is exact
    task = torch.tensor([1, 0, 2], device=DEVICE)
    z = task_core(h, core, factor, task, backend=backend)
    each = task_core(h, core, factor, task.repeat_interleave(25), backend=backend)
    assert torch.equal(z, each)


def test_a_task_without_rows_gets_zeros(backend):
    *_, dfactor = Case(tasks=4, task=(3, 1)).run(torch.float32, backend)
    assert [bool(row.any()) for row in dfactor] == [False, True, False, True]


def test_one_tasks_infinity_stays_its_own(backend):
    """Neither rows nor gradients of another task see it."""
    (h, core, factor), dz = Case(shape=(2, 5), tasks=2, task=(0, 1)).tensors(torch.float32)
    broken = h.detach().clone()
    broken[0, 2, 3] = torch.inf
    broken.requires_grad_()
    task = torch.tensor([0, 1], device=DEVICE)
    z = task_core(broken, core, factor, task, backend=backend)
    assert z[1].isfinite().all() and not z[0].isfinite().all()
    (dfactor,) = torch.autograd.grad(z, factor, dz)
    clean = task_core(h, core, factor, task, backend=backend)
    (expected,) = torch.autograd.grad(clean, factor, dz)
    assert torch.equal(dfactor[1], expected[1]) and not dfactor[0].isfinite().all()


def test_layers_together_are_layers_alone(backend):
    """One operation for all layers; with gradients, of which some are not wanted."""
    draw = drawing(2, torch.float32)
    cores = [draw(6, 5, 3).requires_grad_() for _ in range(3)]
    factors = [draw(4, 3).requires_grad_() for _ in range(3)]
    together = task_cores(cores, factors, backend=backend)
    weights = [draw(4, 6, 5) for _ in together]
    loss = sum((m[0] * w).sum() for m, w in zip(together, weights, strict=True))
    made = torch.autograd.grad(loss, [*cores, *factors])
    for i, m in enumerate(together):
        (alone,) = task_cores(cores[i : i + 1], factors[i : i + 1], backend=backend)
        assert m.shape == alone.shape and torch.equal(m, alone)
        assert m.untyped_storage().nbytes() == 3 * m[0].nbytes  # of three layers, without parts
        grads = torch.autograd.grad((alone[0] * weights[i]).sum(), [cores[i], factors[i]])
        assert torch.equal(made[i], grads[0]) and torch.equal(made[i + 3], grads[1])


def test_parts_of_a_gradient_are_added(backend):
    """Whatever part it comes in."""
    (_, core, factor), _ = Case().tensors(torch.float32)
    (m,) = task_cores([core], [factor], backend=backend)
    parts = torch.randn(m.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run(dtype, which, incoming):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (core, factor)]
        (made,) = task_cores(leaves[:1], leaves[1:], backend=which)
        return torch.autograd.grad(made, leaves, incoming.to(dtype))

    def of_sum(dtype):
        return run(dtype, "reference", parts.to(dtype).sum(0, keepdim=True))

    stock, exact = (partial(of_sum, t) for t in (torch.float32, torch.float64))
    all_within_budget(run(torch.float32, backend, parts), stock, exact, torch.float32, NAMES[2:])


def test_many_rows_are_as_exact_as_torch(backend):
    """Of one sign they show each loss of a long sum."""
    rows = 4096 if backend != "triton" or DEVICE.type == "cuda" else 300
    generator = torch.Generator().manual_seed(3)
    h, core, factor, dz = (
        torch.rand(*shape, generator=generator).to(DEVICE)
        for shape in ((2, rows, 8), (8, 6, 2), (2, 2), (2, rows, 6))
    )

    def run(which, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (h, core, factor)]
        z = task_core(*leaves, torch.tensor([1, 0], device=DEVICE), backend=which)
        return [z, *torch.autograd.grad(z, leaves, dz.to(dtype))]

    stock, exact = (partial(run, "reference", t) for t in (torch.float32, torch.float64))
    all_within_budget(run(backend, torch.float32), stock, exact, torch.float32, NAMES)


def test_a_task_that_is_not_there():
    """On the torch path, whose tasks on a GPU are not read back: NaN, in its own rows alone."""
    h, dz = torch.randn(12, 4), torch.randn(12, 3)
    m, task = torch.randn(1, 2, 4, 3), torch.tensor([0, 2, -1])
    z = torch_path.product(h, m, task)
    dh, dm = torch_path.product_backward(dz, h, m, task, (True, True))
    assert z[4:].isnan().all() and dh[4:].isnan().all()
    assert z[:4].isfinite().all() and dh[:4].isfinite().all()
    assert dm[0, 0].isfinite().all() and dm[0, 0].any() and not dm[0, 1].any()
