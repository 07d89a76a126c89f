# SPDX-License-Identifier: Apache-2.0
"""AdaptFormerMlp and CobotAdaptFormerMlp, alone and in a SamBlock, through the black-box checks."""

import copy

import black_box
import pytest
import torch
from adapt_former_layers import LiteralAdaptFormer, adapted_mlp, cobot_mlp, sided
from black_box import Subject
from draws import DEVICE
from literal_cobot import LiteralCobotAdaptFormer

from samfast.backends import NAMES
from samfast.modules import CobotAdaptFormerMlp, SamBlock

INTERPRETED = (black_box.error_budget, black_box.empty_batch)
# What takes minutes in the interpreter.
LONG = [check.__name__ for check in black_box.CHECKS if check not in INTERPRETED]
SIDE = ("adapter_layer_norm_before", "_proj.")
RELATED = (*SIDE, "gamma", "heads", "FacT_")
COBOT = {"bottleneck": 8, "kind": CobotAdaptFormerMlp, "literal": LiteralCobotAdaptFormer}


def attached(ours, literal):
    """The MLP is frozen."""
    for part in (ours.lin1, ours.lin2):
        part.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 7, 40, generator=generator, dtype=torch.float64)
    return Subject(ours, literal(ours), x.to(DEVICE))


def alone():
    return attached(adapted_mlp(), LiteralAdaptFormer)


def related():
    return attached(cobot_mlp(), LiteralCobotAdaptFormer)


def whole():
    """Every tensor is trained."""
    ours = adapted_mlp()
    x = torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Subject(ours, LiteralAdaptFormer(ours), x.to(DEVICE))


def windows():
    return sided(4, 3, 5, 6, trained=SIDE)


def frugal():
    return sided(0, 3, 5, 6, memory="minimal", trained=(*SIDE, "lin1.bias", "norm1."))


def related_windows():
    return sided(4, 3, 5, 6, trained=RELATED, **COBOT)


def related_frugal():
    return sided(0, 3, 5, 6, memory="minimal", trained=(*RELATED, "lin1.bias", "norm1."), **COBOT)


CASES = [
    pytest.param(alone, "auto", id="alone-auto"),
    pytest.param(whole, "torch", id="whole-torch"),
    pytest.param(windows, "auto", id="block-fast-auto"),
    pytest.param(frugal, "torch", id="block-minimal-torch"),
    pytest.param(related, "auto", id="cobot-alone-auto"),
    pytest.param(related_windows, "auto", id="cobot-block-fast-auto"),
    pytest.param(related_frugal, "torch", id="cobot-block-minimal-torch", marks=pytest.mark.slow),
    pytest.param(related, "triton", id="cobot-alone-triton", marks=pytest.mark.slow),
    pytest.param(alone, "triton", id="alone-triton"),
    pytest.param(frugal, "triton", id="block-minimal-triton", marks=pytest.mark.slow),
    pytest.param(windows, "triton", id="block-fast-triton", marks=pytest.mark.slow),
]


@pytest.mark.slow_on_cpu("block-fast-auto-compiled")
@pytest.mark.slow_on_cpu("block-minimal-torch", "cobot-alone-auto")
@pytest.mark.gpu(*(f"triton-{name}" for name in LONG))
@pytest.mark.slow_on_cpu(
    "triton", "generated", "torch-compiled", "cobot-block-fast-auto", "cobot-alone-auto-compiled"
)
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("make", "backend"), CASES)
def test_black_box(make, check, backend, monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    layers = make()
    block = isinstance(layers.ours, SamBlock)
    assert not block or layers.ours.block_problem() is None
    if backend == "triton":
        choice = copy.deepcopy(layers.ours).float().backends()
        choice = choice["sam_block" if block else "adapt_former"]
        if choice not in NAMES:
            pytest.skip(choice)
    check(layers)
