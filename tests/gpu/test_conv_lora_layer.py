# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of Conv-LoRA; on a CPU the same code runs at tiny sizes.

Values, gradients and module checks run on a GPU too, from tests/kernels and tests/modules.
"""

import pytest
import torch
from draws import DEVICE
from torch import nn

from samfast.functional import conv_experts
from samfast.kernels.conv_experts.op import supports
from samfast.modules import ConvLoraLinear

from . import proofs
from .proofs import CUDA

pytestmark = pytest.mark.slow_on_cpu

REPEATS = 250 if CUDA else 2
SHAPE = (25, 14, 14, 256) if CUDA else (2, 5, 6, 24)


def problem(dtype=torch.float32):
    """x, a layer with random factors, an incoming gradient, and the noise of its gate."""
    torch.manual_seed(0)
    features, experts = SHAPE[-1], 8 if CUDA else 3
    layer = ConvLoraLinear(features, 3 * features, experts=experts, device=DEVICE, dtype=dtype)
    for _, parameter in layer.adapter_parameters():
        nn.init.normal_(parameter, std=0.3)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    x = torch.randn(SHAPE, device=DEVICE).to(dtype).requires_grad_()
    dy = torch.randn(*SHAPE[:-1], 3 * features, device=DEVICE).to(dtype)
    return x, layer, dy, torch.randn(SHAPE[0], experts, device=DEVICE)


def gradients(x, layer, dy, noise):
    y, loss = layer(x, noise=noise, return_aux=True)
    wanted = [x, *(p for _, p in layer.adapter_parameters())]
    return [y, loss, *torch.autograd.grad([y, loss], wanted, [dy, torch.ones_like(loss)])]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(dtype, deterministic):
    call = problem(dtype)
    proofs.same_bits(lambda: gradients(*call), REPEATS, deterministic)


@pytest.mark.gpu("cuda")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_experts_repeat_bit_for_bit(backend):
    torch.manual_seed(0)
    samples, size = (25, 14) if CUDA else (2, 4)
    h = torch.randn(samples, size, size, 3, device=DEVICE, requires_grad=True)
    weight = torch.randn(8, 3, 3, 3, 3, device=DEVICE, requires_grad=True)
    bias = torch.randn(8, 3, device=DEVICE, requires_grad=True)
    if reason := supports(backend, h, weight):
        pytest.skip(reason)
    index = torch.arange(samples, device=DEVICE) % 8

    def run():
        z = conv_experts(h, weight, bias, index, range(1, 9), backend=backend)
        return [z, *torch.autograd.grad(z, [h, weight, bias], torch.ones_like(z))]

    first = run()
    for _ in range(REPEATS):
        assert proofs.same(first, run())


def test_optimizer_steps_under_graph_replay_equal_eager():
    """Routing and factors change between replays, so nothing of them may be frozen in the graph."""

    def prepare():
        x, layer, target, noise = problem()
        x.requires_grad_(False)

        def value():
            y, aux = layer(x, noise=noise, return_aux=True)
            return (y - target).square().mean() + aux

        return value, [p for _, p in layer.adapter_parameters()]

    proofs.steps_under_replay(prepare, 20, 0.01)


@pytest.mark.gpu
def test_counted_launches_are_the_profilers(monkeypatch):
    """The noise, an input here, is one more in training."""
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    call = problem(torch.bfloat16)
    proofs.launches_as_profiled(lambda: gradients(*call))


@pytest.mark.gpu
def test_a_stream_that_is_not_the_default():
    call = problem()
    proofs.another_stream(lambda: gradients(*call))


@pytest.mark.gpu
def test_saved_bytes_are_what_the_allocator_says():
    x, layer, _, noise = problem(torch.bfloat16)
    known, loss = (
        [x, noise, *layer.parameters()],
        4,
    )  # bytes of what the layer keeps to be asked for
    proofs.saved_as_allocated(lambda: layer(x, noise=noise), known, replaced=loss)
