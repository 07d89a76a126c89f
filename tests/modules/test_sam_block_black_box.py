# SPDX-License-Identifier: Apache-2.0
"""SamBlock as one node against the stock block, through the black-box checks."""

import copy

import black_box
import pytest
import torch
from draws import DEVICE
from sam_layers import block, subject
from test_black_box import LiteralLora
from torch import nn

from samfast.backends import NAMES
from samfast.modules import LoraLinear, QkvLora, SamBlock

SIZE = (5, 6)
PLACES = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")


def put(model, place, layer):
    holder, _, leaf = place.rpartition(".")
    setattr(model.get_submodule(holder), leaf, layer.to(DEVICE))


def adapted(window, sliced, trained, memory):
    """Adapters on all four layers; of the base, what ``trained`` names."""
    stock = block(window, SIZE)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    fused = SamBlock.from_block(copy.deepcopy(stock), memory)
    torch.manual_seed(2)
    for place in PLACES:
        linear = fused.get_submodule(place)
        if sliced and place == "attn.qkv":
            layer = QkvLora.from_linear(linear, rank=2)
            literal = LiteralLora(layer, 1.0, layer.ranges)
        else:
            layer = LoraLinear.from_linear(linear, rank=3)
            literal = LiteralLora(layer, layer.scaling)
        nn.init.normal_(layer.lora_B, std=0.2)
        put(fused, place, layer)
        put(stock, place, literal)
    return subject(stock, 3, *SIZE, ours=fused)


def windows():
    """As attached, with a trained bias that the padding reaches."""
    return adapted(4, False, ("qkv.bias",), "fast")


def frugal():
    return adapted(4, True, ("norm1.", "lin1.bias"), "minimal")


def whole():
    """Every tensor is trained."""
    return adapted(0, True, ("",), "balanced")


CASES = [
    pytest.param(windows, "auto", id="windows-fast-auto"),
    pytest.param(whole, "torch", id="map-balanced-torch"),
    pytest.param(frugal, "auto", id="windows-minimal-auto"),
    pytest.param(whole, "triton", id="map-balanced-triton", marks=pytest.mark.slow),
    pytest.param(windows, "triton", id="windows-fast-triton", marks=pytest.mark.slow),
]
INTERPRETED = (black_box.error_budget, black_box.empty_batch)
# What takes minutes in the interpreter.
LONG = [check.__name__ for check in black_box.CHECKS if check not in INTERPRETED]


@pytest.mark.slow_on_cpu("map-balanced-torch")
@pytest.mark.gpu(*(f"triton-{name}" for name in LONG))
@pytest.mark.slow_on_cpu(
    "generated", "map-balanced-torch-compiled", "windows-minimal-auto-compiled"
)
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("make", "backend"), CASES)
def test_black_box(make, check, backend, monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    layers = make()
    assert layers.ours.block_problem() is None
    if backend == "triton":
        choice = copy.deepcopy(layers.ours).float().backends()["sam_block"]
        if choice not in NAMES:
            pytest.skip(choice)
    check(layers)
