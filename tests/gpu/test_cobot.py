# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove of SAM-COBOT's fold; on a CPU the same code runs at tiny sizes.

Values and gradients run on a GPU too, from tests/kernels.
"""

import pytest
import torch
from draws import DEVICE
from torch import nn

from samfast.backends import triton_missing
from samfast.functional import cobot_fold
from samfast.methods.cobot.layer import CobotForward, relation
from samfast.modules import CobotQkvLora

from . import proofs
from .proofs import CUDA

pytestmark = pytest.mark.slow_on_cpu

REPEATS = 250 if CUDA else 2
LAYERS, WIDTH = (12, 768) if CUDA else (2, 16)
BACKEND = "torch" if triton_missing(DEVICE) else "triton"


def model():
    """Layers that share a relation, and take their factors from one fold."""
    torch.manual_seed(0)
    linears = [nn.Linear(WIDTH, 3 * WIDTH, device=DEVICE) for _ in range(LAYERS)]
    shared = relation(4, 2 * LAYERS, linears[0].weight)
    layers = [CobotQkvLora.from_linear(layer, 4, shared, i) for i, layer in enumerate(linears)]
    for layer in layers:
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
    return layers


def gradients(layers):
    shared = [layers[0].FacT_c, layers[0].FacT_p]
    lists = zip(*(layer.own_sources() for layer in layers), strict=True)
    folded, _ = cobot_fold(*shared, *lists, backend=BACKEND)
    leaves = [*shared, *(t for layer in layers for t in layer.own_sources())]
    return [*folded, *torch.autograd.grad(sum(f.square().sum() for f in folded), leaves)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_bits_every_time(deterministic):
    layers = model()
    proofs.same_bits(lambda: gradients(layers), REPEATS, deterministic)


def test_optimizer_steps_under_graph_replay_equal_eager():
    """Coefficients and heads updated between replays must be seen in every layer's factors."""

    def prepare():
        layers = model()
        fold = CobotForward(layers)
        x = torch.randn(64, WIDTH, device=DEVICE)

        def loss():
            fold.open(layers[0], ())
            total = sum(layer(x).square().mean() for layer in layers)
            fold.close(layers[0], (), None)
            return total

        trained = {id(p): p for layer in layers for _, p in layer.adapter_parameters()}
        return loss, list(trained.values())

    proofs.steps_under_replay(prepare, 20, 0.01)


@pytest.mark.gpu
def test_a_stream_that_is_not_the_default():
    layers = model()
    proofs.another_stream(lambda: gradients(layers))


@pytest.mark.gpu
def test_the_profiler_sees_the_counted_launches():
    layers = model()
    proofs.launches_as_profiled(lambda: gradients(layers))
