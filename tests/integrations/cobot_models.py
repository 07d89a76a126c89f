# SPDX-License-Identifier: Apache-2.0
"""Small models of segment_anything's blocks under SAM-COBOT's layers."""

import cobot_twins as cobot
import torch
from literal_wrappers import linear
from peft_models import DEPTH, trunk
from torch import nn

WIDTH = 32
ADAPTED = ("linear_", "FacT_", "gamma", "adapter_", "down_proj", "up_proj", "scale", "rel_pos_")


def moved(model, std=0.3):
    """Layers as after training, and tables that matter; the same at every call.

    The bottleneck is mostly off or mostly on: near zero rounding decides what a ReLU lets through.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ADAPTED):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(std * noise)
            if "down_proj.bias" in name:
                parameter.mul_(15)
    return model


def shared(rank, slices):
    """FacT_c and FacT_p of a model."""
    return nn.Parameter(torch.ones(1, rank, slices)), nn.Parameter(torch.eye(slices))


def lora(head=cobot.QuaternionLinear):
    """The trunk under related LoRA; x: (B, 5, 6, 32)."""
    model = trunk().requires_grad_(False)
    c, p = shared(4, 2 * DEPTH)
    for i, block in enumerate(model.blocks):
        factors = [linear(*shape) for shape in 2 * ((WIDTH, 4), (4, WIDTH))]
        heads = head(4, 4), head(4, 4)
        args = block.attn.qkv, *factors, c, *heads, p, 2 * i
        block.attn.qkv = cobot._LoRA_qkv_relation_add(*args)
    return moved(model)


def adapters(**options):
    """The trunk under AdaptFormer."""
    model = trunk().requires_grad_(False)
    for block in model.blocks:
        block.mlp = cobot.Adapter(block.mlp, WIDTH, **options)
    return moved(model)


def related(head=cobot.QuaternionLinear, **options):
    """The trunk under related AdaptFormer."""
    model = trunk().requires_grad_(False)
    c, p = shared(16, DEPTH)
    for i, block in enumerate(model.blocks):
        block.mlp = cobot.Adapter_relation(block.mlp, c, head(16, 16), p, i, WIDTH, **options)
    return moved(model)


MODELS = {"lora": lora, "adapter": adapters, "related": related}
KINDS = {"lora": "_LoRA_qkv_relation_add", "adapter": "Adapter", "related": "Adapter_relation"}


def layer_of(model, kind, block=0):
    """The adapted layer of a block."""
    return model.blocks[block].attn.qkv if kind == "lora" else model.blocks[block].mlp
