# SPDX-License-Identifier: Apache-2.0
"""Training with samfast's LoRA is training with the literal method."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samfast
from samfast.adapters.adapter import adapters
from samfast.models import segment, unused_by_segment

STEPS = 64


class LiteralLora(nn.Module):
    """y = linear(x) + s · (x Aᵀ) Bᵀ, or the unscaled update on slices of qkv, by plain calls."""

    def __init__(self, layer, linear):
        super().__init__()
        self.linear, self.layer = linear, [layer]
        self.lora_A, self.lora_B = (
            nn.Parameter(p.detach().clone()) for p in (layer.lora_A, layer.lora_B)
        )

    def forward(self, x):
        layer, y = self.layer[0], self.linear(x)
        if not hasattr(layer, "slices"):
            return y + layer.scaling * ((x @ self.lora_A.T) @ self.lora_B.T)
        parts = list(y.chunk(3, dim=-1))
        n = len(layer.slices)
        for name, a, b in zip(
            layer.slices, self.lora_A.chunk(n), self.lora_B.chunk(n), strict=True
        ):
            i = "qkv".index(name)
            parts[i] = parts[i] + (x @ a.T) @ b.T
        return torch.cat(parts, dim=-1)


def with_literal_lora(model, attached):
    """The stock model with the literal modules, starting from the attached model's values."""
    trained = dict(samfast.trainable_parameters(attached))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for name, layer in adapters(attached).items():
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, LiteralLora(layer, linear))
    return model


def train(model, forward, images, target, steps=STEPS):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-4)
    losses = []
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(forward(model, images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow_on_cpu("sliced")
@pytest.mark.parametrize(
    "method",
    [
        samfast.Lora(rank=4, alpha=8, target=("qkv", "lin1")),
        samfast.Lora(rank=2, slices=("q", "v")),
    ],
    ids=["lora", "sliced"],
)
def test_converges_as_the_literal_method(toy, method):
    torch.manual_seed(0)
    attached = samfast.attach(toy(width=24), method, train="mask_decoder.lin1")
    literal = with_literal_lora(toy(width=24), attached)
    images, target = torch.randn(8, 3, 16, 16), torch.rand(8, 16).round()
    ours = train(attached, lambda m, x: m(x), images, target)
    theirs = train(literal, lambda m, x: m(x), images, target)
    assert ours[-1] < 0.9 * ours[0]
    assert (ours - theirs).abs().max() <= 2e-6


@pytest.mark.slow_on_cpu
def test_vit_tiny_converges_as_the_literal_method(tiny_sam):
    torch.manual_seed(0)
    attached = samfast.attach(tiny_sam(), samfast.Lora(rank=4), train=())
    literal = with_literal_lora(tiny_sam(), attached)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    target = (images[:, :1] > 127).float()
    ours, theirs = (train(m, segment, images, target) for m in (attached, literal))
    assert ours[-1] < ours[0]
    assert (ours - theirs).abs().max() <= 2e-6


def test_every_trained_tensor_of_vit_tiny_moves_within_three_steps(tiny_sam):
    sam = samfast.attach(tiny_sam(), samfast.Lora(rank=4)).train()
    start = {n: p.detach().clone() for n, p in samfast.trainable_parameters(sam)}
    frozen = copy.deepcopy({n: p for n, p in sam.named_parameters() if n not in start})
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    train(sam, segment, images, (images[:, :1] > 127).float(), steps=3)
    now = dict(sam.named_parameters())
    still = {name for name in start if torch.equal(start[name], now[name])}
    assert still == set(unused_by_segment(sam)) & set(start)
    assert all(torch.equal(frozen[name], now[name]) for name in frozen)
