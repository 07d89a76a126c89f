# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of lora_linear; on a CPU the same code runs at tiny sizes.

Values, gradients and module checks run on a GPU too, from tests/kernels and tests/modules.
"""

import pytest
import torch
from draws import DEVICE
from torch import nn

from samfast.backends import triton_missing
from samfast.counters import count
from samfast.functional import lora_linear
from samfast.modules import LoraLinear

from . import proofs
from .proofs import CUDA

pytestmark = pytest.mark.slow_on_cpu

REPEATS = 250 if CUDA else 3
SHAPE = (4, 70, 70, 256) if CUDA else (2, 9, 24)
BACKEND = "triton" if triton_missing(DEVICE) is None else "torch"


def problem(dtype=torch.float32, rank=4):
    """x, a layer with random factors, and an incoming gradient."""
    torch.manual_seed(0)
    features = SHAPE[-1]
    layer = LoraLinear(features, 3 * features, rank, device=DEVICE, dtype=dtype)
    nn.init.normal_(layer.lora_B)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    x = torch.randn(SHAPE, device=DEVICE).to(dtype).requires_grad_()
    return x, layer, torch.randn(*SHAPE[:-1], 3 * features, device=DEVICE).to(dtype)


def gradients(x, layer, dy, dropout=0.0, seed=None):
    y = lora_linear(
        x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling,
        dropout=dropout, seed=seed, backend=BACKEND,
    )  # fmt: skip
    return [y, *torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_bits_every_time(dtype, deterministic):
    call, seed = problem(dtype), torch.tensor([9], device=DEVICE)
    proofs.same_bits(lambda: gradients(*call, 0.1, seed), REPEATS, deterministic)


def test_optimizer_steps_under_graph_replay_equal_eager():
    """Factors updated between replays must be seen: nothing of them may be frozen in the graph."""

    def prepare():
        x, layer, target = problem()
        x.requires_grad_(False)
        return lambda: (layer(x) - target).square().mean(), [layer.lora_A, layer.lora_B]

    proofs.steps_under_replay(prepare, 20, 0.05)


def test_counted_launches_and_syncs():
    x, layer, dy = problem()
    counts = count(lambda: gradients(x, layer, dy))
    assert counts.total_launches <= (8 if BACKEND == "triton" else 14)
    assert counts.total_syncs == 0


@pytest.mark.gpu
def test_a_stream_that_is_not_the_default():
    call = problem()
    proofs.another_stream(lambda: gradients(*call))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_are_what_the_allocator_says(dtype):
    x, layer, _ = problem(dtype)
    known = [x, layer.weight, layer.bias, layer.lora_A, layer.lora_B]
    proofs.saved_as_allocated(lambda: layer(x), known)


@pytest.mark.gpu
def test_the_profiler_sees_the_counted_launches():
    call = problem(torch.bfloat16)
    proofs.launches_as_profiled(lambda: gradients(*call))
