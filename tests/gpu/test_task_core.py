# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of the products with cores of tasks; on a CPU the same code runs small.

Values, gradients and operators run on a GPU too, from tests/kernels.
"""

import pytest
import torch
from draws import DEVICE, drawing

from samfast.backends import triton_missing
from samfast.counters import count
from samfast.functional import task_core, task_cores
from samfast.kernels.lora_linear.op import low_rank_linear
from samfast.kernels.task_core import cuda_path, middle_key

from . import proofs
from .proofs import CUDA

pytestmark = pytest.mark.slow_on_cpu

REPEATS = 250 if CUDA else 2
SAMPLES, TOKENS, WIDTH = (6, 4096, 1024) if CUDA else (3, 5, 12)
RANKS, TASKS = (32, 24, 4) if CUDA else (4, 3, 2), 3
BACKENDS = [name for name, missing in (
    ("triton", triton_missing(DEVICE)), ("cuda", cuda_path.missing(DEVICE, max(RANKS)))
) if missing is None] or ["torch"]  # fmt: skip
TASK = {"one": [1], "all": [0, 1, 2], "mixed": [2, 0, 2, 1, 1, 2][:SAMPLES]}


def problem(dtype=torch.float32, task="mixed"):
    """h, core and factor_task as leaves, the tasks, and an incoming gradient."""
    draw = drawing(0, torch.float32)
    rows, columns, depth = RANKS
    h = draw(SAMPLES, TOKENS, rows, dtype=dtype)
    core, factor = draw(*RANKS) / rows**0.5, draw(TASKS, depth)
    dz = draw(SAMPLES, TOKENS, columns, dtype=dtype)
    leaves = [t.requires_grad_() for t in (h, core, factor)]
    return leaves, torch.tensor(TASK[task], device=DEVICE), dz


def gradients(leaves, task, dz, backend):
    z = task_core(*leaves, task, backend=backend)
    return [z, *torch.autograd.grad(z, leaves, dz)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", TASK)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend, task, dtype, deterministic):
    call = problem(dtype, task)
    proofs.same_bits(lambda: gradients(*call, backend), REPEATS, deterministic)


@pytest.mark.parametrize("backend", BACKENDS)
def test_optimizer_steps_under_graph_replay_equal_eager(backend):
    """Cores and factors updated between replays must be seen: no M may be frozen in the graph."""
    low_rank = "triton" if backend == "cuda" else backend

    def prepare():
        draw = drawing(0, torch.float32)
        x, weight = draw(SAMPLES, TOKENS, WIDTH), draw(WIDTH, WIDTH) / WIDTH
        target = draw(SAMPLES, TOKENS, WIDTH)
        a, b = draw(RANKS[0], WIDTH) / WIDTH**0.5, draw(WIDTH, RANKS[1])
        core, factor = draw(*RANKS), draw(TASKS, RANKS[2])
        trained = [t.requires_grad_() for t in (a, b, core, factor)]
        task = torch.tensor(TASK["all"], device=DEVICE)

        def loss():
            (m,) = task_cores([core], [factor], backend=backend)
            y, _, _ = low_rank_linear(
                x, weight, None, a, b, 0.1, middle=middle_key(backend), params=[m, task],
                backend=low_rank,
            )  # fmt: skip
            return (y - target).square().mean()

        return loss, trained

    proofs.steps_under_replay(prepare, steps=10, rate=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_launches(backend):
    """Seven: cores and product, gathered each way and, back, a copy of the layers' gradients."""
    call = problem()
    counts = count(lambda: gradients(*call, backend))
    assert counts.total_launches <= (7 if backend != "torch" else 40)
    assert counts.total_syncs == 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_task_that_is_not_there(backend):
    """It is not read back: its rows become NaN, and no core's gradient sees them."""
    leaves, _, dz = problem()
    task = torch.tensor([0, 7, -1], device=DEVICE)
    z, dh, dcore, dfactor = gradients(leaves, task, dz, backend)
    third = SAMPLES // 3
    assert z[third:].isnan().all() and dh[third:].isnan().all() and z[:third].isfinite().all()
    assert dcore.isfinite().all() and dfactor[0].any() and not dfactor[1:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_that_is_not_the_default(backend):
    call = problem()
    proofs.another_stream(lambda: gradients(*call, backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_cores_alone_are_kept(backend):
    """Beside h, the parameters and tasks, which are known here."""
    leaves, task, _ = problem(torch.bfloat16)
    proofs.saved_as_allocated(lambda: task_core(*leaves, task, backend=backend), [*leaves, task])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_profiler_sees_the_counted_launches(backend):
    if backend == "cuda":
        pytest.skip("its kernels carry mangled names, which the counter does not know")
    call = problem(torch.bfloat16)
    proofs.launches_as_profiled(lambda: gradients(*call, backend))
