# SPDX-License-Identifier: Apache-2.0
"""Training with samfast's Conv-LoRA is training with the literal method."""

import pytest
import torch
from literal_conv_lora import LiteralConvLora
from torch import nn
from torch.nn import functional as F

import samfast
from samfast.adapters.adapter import adapters
from samfast.models import segment, unused_by_segment

STEPS = 64


class Remembering(nn.Module):
    """The literal module in place of a layer; keeps its loss of the latest forward."""

    def __init__(self, layer):
        super().__init__()
        self.literal = LiteralConvLora(layer)
        self.loss = None

    def forward(self, x):
        y, self.loss = self.literal(x)
        return y


def with_literal_layers(model, attached):
    """The stock model with literal layers, starting from the attached model's values."""
    trained = dict(samfast.trainable_parameters(attached))
    layers = {name: Remembering(layer) for name, layer in adapters(attached).items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        layer.literal.weight = model.get_submodule(name).weight
        layer.literal.bias = model.get_submodule(name).bias
        setattr(model.get_submodule(parent), leaf, layer)
    return model, lambda: sum(layer.loss for layer in layers.values())


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return images, (images[:, :1] > 127).float()


def train(model, forward, aux, images, target, steps=STEPS):
    """(steps, 2): every step's loss of the task and of the gates, under one stream of noise."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4)
    torch.manual_seed(9)
    losses = []
    for _ in range(steps):
        task = F.binary_cross_entropy_with_logits(forward(model, images), target)
        balance = aux()
        optimizer.zero_grad()
        (task + balance).backward()
        optimizer.step()
        losses.append(torch.stack([task.detach(), balance.detach()]))
    return torch.stack(losses)


def compare(attached, stock, forward, images, target):
    literal, literal_aux = with_literal_layers(stock, attached)
    ours = train(attached, forward, lambda: samfast.aux_loss(attached), images, target)
    theirs = train(literal, forward, literal_aux, images, target)
    task, balance = ours.unbind(1)
    assert task[-8:].mean() < task[:8].mean() and (balance > 0).all()
    assert (ours.sum(1) - theirs.sum(1)).abs().max() <= 2e-6


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("depthwise", [False, True], ids=["full", "depthwise"])
def test_converges_as_the_literal_method(toy, depthwise):
    torch.manual_seed(0)
    method = samfast.ConvLora(depthwise=depthwise)
    attached = samfast.attach(toy(width=24), method, train="mask_decoder.lin1")
    images, target = torch.randn(4, 3, 16, 16), torch.rand(4, 16).round()
    compare(attached, toy(width=24), lambda model, x: model(x), images, target)


@pytest.mark.slow_on_cpu
def test_vit_tiny_converges_as_the_literal_method(tiny_sam, data):
    torch.manual_seed(0)
    # A block with windows and one without; the others would only take time.
    method = samfast.ConvLora(target=r"image_encoder\.blocks\.[12]\.attn\.qkv")
    attached = samfast.attach(tiny_sam(), method, train=())
    compare(attached, tiny_sam(), segment, *data)


def test_every_trained_tensor_moves_within_three_steps(tiny_sam, data):
    sam = samfast.attach(tiny_sam(), samfast.ConvLora())
    start = {n: p.detach().clone() for n, p in samfast.trainable_parameters(sam)}
    frozen = {n: p.detach().clone() for n, p in sam.named_parameters() if n not in start}
    train(sam, segment, lambda: samfast.aux_loss(sam), *data, steps=3)
    now = dict(sam.named_parameters())
    still = {name for name in start if torch.equal(start[name], now[name])}
    assert still == set(unused_by_segment(sam)) & set(start)
    assert all(torch.equal(frozen[name], now[name]) for name in frozen)
