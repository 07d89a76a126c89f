# SPDX-License-Identifier: Apache-2.0
"""Every module of samfast.modules at a small size, with numbers in all of it, and an input."""

import torch
from draws import DEVICE
from torch import nn

import samfast.modules
from samfast.integrations import segment_anything
from samfast.methods.cobot.layer import relation

D, OUT, SIDE, WINDOW, HEADS = 64, 192, 14, 7, 2
MAPS = ("RelPosAttention", "SamBlock")
INHERITING = (*MAPS, "AdaptFormerMlp", "CobotAdaptFormerMlp")
NAMES = tuple(samfast.modules.__all__)


def module(name: str, dtype: torch.dtype) -> nn.Module:
    """In eval, on DEVICE: its adapters drawn from a seed, all of it in dtype."""
    torch.manual_seed(0)
    made = _made(name, getattr(samfast.modules, name))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype) * max(p.shape[-1], 4) ** -0.5)
        if hasattr(made, "down_proj"):  # far from zero, where a ReLU's gradient jumps
            signs = 1.0 - 2.0 * (torch.arange(made.bottleneck) % 2)
            made.down_proj.bias.copy_(4 * signs)
    return made.eval().to(DEVICE, dtype)


def _made(name, kind) -> nn.Module:
    linear = nn.Linear(D, OUT)
    if name == "CobotQkvLora":
        return kind.from_linear(linear, 4, relation(4, 2, linear.weight), 0)
    if name == "TaskLoraLinear":
        return kind(D, OUT, tasks=2, ranks=(8, 6, 2))
    if name in ("LoraLinear", "QkvLora"):
        return kind(D, OUT, 4)
    if name == "ConvLoraLinear":
        return kind(D, OUT, experts=4)
    if name == "QuaternionLinear":
        return kind(D, OUT)
    if name in ("PHMLinear", "KroneckerLinear"):
        return kind(D, OUT, 4)
    encoder = segment_anything.load().modeling.image_encoder
    if name == "RelPosAttention":
        stock = encoder.Attention(D, HEADS, use_rel_pos=True, input_size=(SIDE, SIDE))
        return kind.from_attention(stock)
    block = encoder.Block(
        D, HEADS, use_rel_pos=True, window_size=WINDOW, input_size=(SIDE, SIDE), mlp_ratio=2
    )
    if name == "SamBlock":
        return kind.from_block(block)
    if name == "CobotAdaptFormerMlp":
        shared = relation(16, 1, block.mlp.lin1.weight)
        return kind.from_mlp(block.mlp, 16, shared=shared, index=0)
    return kind.from_mlp(block.mlp, 16)


def call(name: str, dtype: torch.dtype):
    """The module, x that wants a gradient, and dy."""
    made = module(name, dtype)
    generator = torch.Generator().manual_seed(1)
    shape = (2, SIDE, SIDE, D)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    with torch.no_grad():
        like = made(x)
    dy = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return made, x.requires_grad_(), dy.to(DEVICE, dtype)


def gradients(made: nn.Module, x, dy) -> list[torch.Tensor]:
    """y, and the gradients of x and of all parameters."""
    y = made(x)
    wanted = [x, *made.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy, materialize_grads=True)]
