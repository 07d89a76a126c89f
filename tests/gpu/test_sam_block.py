# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of the fused block; on a CPU the same code runs at tiny sizes.

Values, gradients and module checks run on a GPU too, from tests/kernels and tests/modules.
"""

import copy

import pytest
import torch
from draws import DEVICE
from torch import nn

from samfast.backends import triton_missing
from samfast.counters import counting
from samfast.integrations import segment_anything
from samfast.kernels._common.windows import Windows
from samfast.kernels.sam_block import costs

from . import proofs
from .proofs import CUDA

proofs.need_segment_anything()

from samfast.modules import LoraLinear, SamBlock  # noqa: E402

pytestmark = pytest.mark.slow_on_cpu

REPEATS = 100 if CUDA else 1
STEPS = 20 if CUDA else 2
BACKEND = "triton" if triton_missing(DEVICE) is None else "torch"
RANK = 4
# (map, window, width, heads): padded windows, and a map that attends to all of itself
SIZES = {
    "windows": (64, 14, 1280, 16) if CUDA else (3, 2, 16, 1),
    "global": (64, 0, 768, 12) if CUDA else (2, 0, 16, 1),
}


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", BACKEND)


def problem(kind, dtype=torch.float32):
    """A frozen block with adapters on its four layers, x that wants a gradient, and dy."""
    side, window, width, heads = SIZES[kind]
    torch.manual_seed(0)
    stock = segment_anything.load().modeling.image_encoder.Block(
        width, heads, use_rel_pos=True, window_size=window, input_size=(side, side)
    )
    for name, parameter in stock.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.1)
    stock = stock.to(dtype).requires_grad_(False)
    for owner, name in (("attn", "qkv"), ("attn", "proj"), ("mlp", "lin1"), ("mlp", "lin2")):
        layers = getattr(stock, owner)
        layer = LoraLinear.from_linear(getattr(layers, name), RANK)
        nn.init.normal_(layer.lora_B, std=0.1)
        setattr(layers, name, layer)
    x, dy = (torch.randn(1, side, side, width).to(DEVICE, dtype) for _ in range(2))
    return stock.to(DEVICE), x.requires_grad_(), dy


def trained(block):
    return [p for p in block.parameters() if p.requires_grad]


def gradients(block, x, dy):
    y = block(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained(block)], dy)]


def fused(kind, dtype=torch.float32):
    stock, x, dy = problem(kind, dtype)
    block = SamBlock.from_block(stock)
    assert block.block_problem() is None
    return block, x, dy


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", SIZES)
def test_the_same_bits_every_time(kind, dtype, deterministic):
    call = fused(kind, dtype)
    proofs.same_bits(lambda: gradients(*call), REPEATS, deterministic)


@pytest.mark.parametrize("kind", ["windows", "global"])
def test_optimizer_steps_under_graph_replay_equal_eager(kind):
    """Factors updated between replays must be seen: nothing of them may be frozen in the graph."""

    def prepare():
        block, x, target = fused(kind)
        x.requires_grad_(False)
        return lambda: (block(x) - target).square().mean(), trained(block)

    proofs.steps_under_replay(prepare, STEPS, 0.05)


@pytest.mark.skipif(BACKEND != "triton", reason="counts of the Triton path")
@pytest.mark.parametrize("kind", SIZES)
def test_counted_launches_and_syncs(kind):
    """As few as the design says."""
    side, window, width, heads = SIZES[kind]
    block, x, dy = fused(kind, torch.float16)
    with counting() as counts:
        gradients(block, x, dy)
    sides = (window, window) if window else (side, side)
    design = costs.stages(Windows(1, side, side, *sides), width, heads, RANK, itemsize=2)
    number = sum(stage.launches for stage in design)
    assert counts.total_launches == number == (30 if max(sides) <= 16 else 32)
    assert counts.total_syncs == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_bfloat16_against_float64(kind):
    """At the sizes of SAM, which the interpreter has no time for."""
    from budgets import all_within_budget
    from stock_runs import by_reference

    stock, x, dy = problem(kind, torch.bfloat16)
    ours = gradients(SamBlock.from_block(copy.deepcopy(stock)), x, dy)
    stock_run = by_reference(gradients, stock, x, dy)
    wide, wide_x = copy.deepcopy(stock).double(), x.detach().double().requires_grad_()
    exact = by_reference(gradients, wide, wide_x, dy.double())
    names = ["y", "dx", *(n for n, p in stock.named_parameters() if p.requires_grad)]
    all_within_budget(ours, stock_run, exact, torch.bfloat16, names)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_counted_launches_are_the_profilers(kind):
    call = fused(kind, torch.bfloat16)
    proofs.launches_as_profiled(lambda: gradients(*call))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_a_stream_that_is_not_the_default(kind):
    call = fused(kind, torch.bfloat16)
    proofs.another_stream(lambda: gradients(*call))


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["fast", "balanced", "minimal"])
@pytest.mark.parametrize("kind", SIZES)
def test_saved_bytes_are_what_the_allocator_says(kind, memory):
    block, x, _ = fused(kind, torch.bfloat16)
    block.memory = memory
    proofs.saved_as_allocated(lambda: block(x), [x, *block.parameters()])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SIZES)
def test_memory_modes_give_the_same_bits(kind):
    made = {}
    for memory in ("fast", "balanced", "minimal"):
        block, x, dy = fused(kind, torch.bfloat16)
        block.memory = memory
        made[memory] = gradients(block, x, dy)
    for memory in ("balanced", "minimal"):
        assert proofs.same(made[memory], made["fast"])
