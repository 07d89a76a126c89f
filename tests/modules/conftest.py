# SPDX-License-Identifier: Apache-2.0
"""Models for the tests of modules."""

import copy

import pytest
import torch
from toy_sam import ToySam

from samfast.models import build_sam


@pytest.fixture
def toy():
    """ToySam with the same weights at every call."""

    def build(seed=0, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ToySam(**options).eval()

    return build


@pytest.fixture(scope="session")
def _tiny_sam():
    return build_sam("vit_tiny", image_size=64, seed=0)


@pytest.fixture
def tiny_sam(_tiny_sam):
    """A fresh vit_tiny of 64 x 64 pixels, the same weights at every call."""
    return lambda: copy.deepcopy(_tiny_sam)


@pytest.fixture
def move():
    """Fill all trained tensors with random numbers, as training would."""

    def fill(model, seed=1, std=0.05):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += std * noise.to(parameter)
        return model

    return fill


@pytest.fixture
def one_layout():
    """Give an encoder's neck one layout of memory, whatever blocks leave: torch's convolutions are
    up to twice less exact on what whole blocks give, which is channels-last."""

    def hook(encoder):
        encoder.neck.register_forward_pre_hook(lambda _, args: args[0].contiguous())
        return encoder

    return hook


@pytest.fixture
def same_noise(monkeypatch):
    """Gates of every dtype draw the same: torch's float32 and float64 draws of a seed differ."""

    def draw(like, samples, experts, generator=None):
        noise = torch.randn(samples, experts, dtype=torch.float64, generator=generator)
        return noise.to(like.device, torch.promote_types(like.dtype, torch.float32))

    monkeypatch.setattr("samfast.methods.conv_lora.layer.draw_noise", draw)
