# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of the branch, alone and in a block; on a CPU at tiny sizes.

Values, gradients and module checks run on a GPU too, from tests/kernels and tests/modules.
"""

import copy

import pytest
import torch
from torch import nn

from samfast.backends import triton_missing
from samfast.counters import counting
from samfast.integrations import segment_anything
from samfast.kernels._common.windows import Windows
from samfast.kernels.sam_block import costs

from .proofs import (
    CUDA,
    DEVICE,
    another_stream,
    launches_as_profiled,
    need_segment_anything,
    same,
    same_bits,
    saved_as_allocated,
    steps_under_replay,
)

need_segment_anything()

from samfast.modules import AdaptFormerMlp, SamBlock  # noqa: E402

pytestmark = pytest.mark.slow_on_cpu

REPEATS = 100 if CUDA else 1
STEPS = 20 if CUDA else 2
BACKEND = "triton" if triton_missing(DEVICE) is None else "torch"
BOTTLENECK, WINDOW = (16, 14) if CUDA else (4, 2)
SIDE, WIDTH, HEADS = (64, 1280, 16) if CUDA else (3, 16, 1)
KINDS = ("alone", "block")


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", BACKEND)


def problem(kind, dtype=torch.float32):
    """A frozen MLP, or a block with one, beside which the branch is trained; x, and dy."""
    torch.manual_seed(0)
    block = segment_anything.load().modeling.image_encoder.Block(
        WIDTH, HEADS, use_rel_pos=True, window_size=WINDOW, input_size=(SIDE, SIDE)
    )
    block = block.to(dtype).requires_grad_(False)
    block.mlp = AdaptFormerMlp.from_mlp(block.mlp, BOTTLENECK, dropout=0.1)
    nn.init.normal_(block.mlp.up_proj.weight, std=0.1)
    x, dy = (torch.randn(1, SIDE, SIDE, WIDTH).to(DEVICE, dtype) for _ in range(2))
    module = SamBlock.from_block(block) if kind == "block" else block.mlp
    return module.to(DEVICE), x.requires_grad_(), dy


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def gradients(module, x, dy, seed=3):
    """With the dropout of that seed."""
    torch.manual_seed(seed)
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained(module)], dy)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind, deterministic):
    call = problem(kind, torch.float16)
    same_bits(lambda: gradients(*call), REPEATS, deterministic)


@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_steps_under_graph_replay_equal_eager(kind):
    """The branch's tensors, updated between replays, must be seen."""

    def prepare():
        module, x, target = problem(kind)
        module.eval()
        x.requires_grad_(False)
        return lambda: (module(x) - target).square().mean(), trained(module)

    steps_under_replay(prepare, STEPS, 0.05)


@pytest.mark.skipif(BACKEND != "triton", reason="counts of the Triton path")
def test_counted_launches_and_syncs():
    """Nine more than the block alone, and the dropout's seed."""
    module, x, dy = problem("block", torch.float16)
    with counting() as counts:
        gradients(module, x, dy)
    windows = Windows(1, SIDE, SIDE, WINDOW, WINDOW)
    design = [
        *costs.stages(windows, WIDTH, HEADS, 0, itemsize=2),
        *costs.side(windows, WIDTH, BOTTLENECK, itemsize=2),
    ]
    assert counts.total_launches == sum(stage.launches for stage in design) + 1 == 30
    assert counts.total_syncs == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_against_float64(kind):
    """At the sizes of SAM, which the interpreter has no time for."""
    from budgets import all_within_budget
    from stock_runs import by_reference

    module, x, dy = problem(kind, torch.bfloat16)
    module.eval()
    ours = gradients(module, x, dy)
    stock_run = by_reference(gradients, module, x, dy)
    wide, wide_x = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    exact = by_reference(gradients, wide, wide_x, dy.double())
    names = ["y", "dx", *(n for n, p in module.named_parameters() if p.requires_grad)]
    all_within_budget(ours, stock_run, exact, torch.bfloat16, names)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_counted_launches_are_the_profilers(kind):
    call = problem(kind, torch.bfloat16)
    launches_as_profiled(lambda: gradients(*call))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_not_the_default(kind):
    call = problem(kind, torch.bfloat16)
    another_stream(lambda: gradients(*call))


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["fast", "balanced", "minimal"])
def test_saved_bytes_are_what_the_allocator_says(memory):
    module, x, _ = problem("block", torch.bfloat16)
    module.memory = memory
    saved_as_allocated(lambda: module(x), [x, *module.parameters()])


@pytest.mark.gpu
def test_memory_modes_give_the_same_bits():
    made = {}
    for memory in ("fast", "balanced", "minimal"):
        module, x, dy = problem("block", torch.bfloat16)
        module.memory = memory
        made[memory] = gradients(module, x, dy)
    for memory in ("balanced", "minimal"):
        assert same(made[memory], made["fast"])
