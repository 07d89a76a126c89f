# SPDX-License-Identifier: Apache-2.0
"""Small models of segment_anything's blocks under the wrappers of ``literal_wrappers``."""

import copy
import functools
from types import SimpleNamespace

import literal_wrappers as wrappers
import torch
from budgets import all_within_budget
from peft_models import run, trunk

from samfast.models import build_sam

WIDTH, RANK = 32, 3
_MOVED = ("linear_", "rel_pos_", "down_proj", "up_proj", "alpha")


def moved(model, std=0.2):
    """Wrappers as after training, and tables that matter; the same at every call."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in _MOVED):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(std * noise)
    return model


def samed(wrapper=wrappers._LoRA_qkv):
    """The trunk under SAMed's wrappers; x: (B, 5, 6, 32)."""
    model = trunk()
    wrappers.LoRA_Sam(SimpleNamespace(image_encoder=model), RANK, wrapper)
    return moved(model)


def micro(*updated):
    """The trunk under micro-sam's LoRA on these of q, k, v and mlp."""
    model = trunk().requires_grad_(False)
    for block in model.blocks:
        wrappers.LoRASurgery(RANK, block, updated)
    return moved(model)


def branches(**options):
    """The trunk under micro-sam's AdaptFormer."""
    model = trunk().requires_grad_(False)
    for block in model.blocks:
        wrappers.AdaptFormer(RANK, block, projection_size=8, **options)
    return moved(model)


@functools.cache
def _sam():
    model = build_sam("vit_tiny", image_size=64, seed=0)
    model.image_encoder.blocks = model.image_encoder.blocks[:2]
    return model


def sam():
    """A whole Sam of two blocks; images: (B, 3, 64, 64)."""
    return copy.deepcopy(_sam())


def photographs(batch=1):
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def wrapper(kind=wrappers._LoRA_qkv, outputs=3 * WIDTH, rank=RANK):
    """One wrapper of that class over a layer of its own."""
    torch.manual_seed(0)
    layers = [wrappers.linear(*shape) for shape in 2 * ((WIDTH, rank), (rank, WIDTH))]
    return kind(torch.nn.Linear(WIDTH, outputs), *layers)


def as_exact_as(fused, stock, x, dtype=torch.float32):
    """Result and every gradient in the budget of the owner's."""
    double = copy.deepcopy(stock).double()
    return all_within_budget(
        run(fused, x), lambda: run(stock, x), lambda: run(double, x.double()), dtype
    )
