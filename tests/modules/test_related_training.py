# SPDX-License-Identifier: Apache-2.0
"""Training with SAM-COBOT, TA-LoRA and Kronecker products is training with the literal methods."""

import pytest
import torch
from literal_cobot import LiteralCobot, LiteralCobotAdaptFormer
from literal_kronecker import LiteralKronecker
from literal_task_lora import LiteralTaskLora
from segment_anything.modeling.common import MLPBlock
from torch.nn import functional as F

import samfast
from samfast.adapters.adapter import adapters

STEPS = 64
METHODS = {
    "cobot-lora": (lambda: samfast.CobotLora(), LiteralCobot),
    "cobot-lora-zero": (lambda: samfast.CobotLora(zero_start=True), LiteralCobot),
    "cobot-adaptformer": (
        lambda: samfast.AdaptFormer(bottleneck=8, dropout=0.0, cobot=True),
        LiteralCobotAdaptFormer,
    ),
    "ta-lora": (
        lambda: samfast.TaLora(tasks=2, ranks=(6, 5, 2), dropout=0.0, target="lin1"),
        LiteralTaskLora,
    ),
    "kronecker": (lambda: samfast.Kronecker(n=3, rank=2, alpha=4), LiteralKronecker),
}


def with_stock_mlps(model):
    """The toy's own layers in segment_anything's MLP."""
    for block in model.image_encoder.blocks:
        mlp = MLPBlock(block.mlp.lin1.in_features, block.mlp.lin1.out_features)
        mlp.lin1, mlp.lin2 = block.mlp.lin1, block.mlp.lin2
        block.mlp = mlp
    return model


def with_literal_layers(model, attached, kind):
    """The stock model with literal layers, starting from the attached model's values."""
    trained, shared = dict(samfast.trainable_parameters(attached)), {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for name, layer in adapters(attached).items():
        literal = kind(layer).float()
        literal.load_state_dict(layer.state_dict())
        for own, parameter in layer.named_parameters():
            literal.get_parameter(own).requires_grad_(parameter.requires_grad)
        for own in ("FacT_c", "FacT_p"):
            if hasattr(literal, own):
                setattr(literal, own, shared.setdefault(own, getattr(literal, own)))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, literal)
    return model


def train(model, images, target, steps=STEPS, dtype=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model(images).float()
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.fixture(params=METHODS)
def pair(request, toy):
    """The attached model, the literal one, and what they are trained on."""
    make, kind = METHODS[request.param]
    torch.manual_seed(0)
    attached, stock = (with_stock_mlps(toy(width=24)) for _ in range(2))
    samfast.attach(attached, make(), train="mask_decoder.lin1")
    literal = with_literal_layers(stock, attached, kind)
    names = (dict(samfast.trainable_parameters(model)) for model in (attached, literal))
    first, second = ({n: p.numel() for n, p in found.items()} for found in names)
    assert first == second and len(first) > 6
    return attached, literal, torch.randn(8, 3, 16, 16), torch.rand(8, 16).round()


@pytest.mark.slow_on_cpu("ta-lora")
@pytest.mark.slow_on_cpu(but=["ta-lora"])
def test_converges_as_the_literal_method(pair):
    attached, literal, *data = pair
    ours, theirs = train(attached, *data), train(literal, *data)
    assert ours[-1] < 0.98 * ours[0]
    assert (ours - theirs).abs().max() <= 2e-6


@pytest.mark.slow_on_cpu
def test_in_bfloat16(pair):
    attached, literal, *data = pair
    ours, theirs = (train(model, *data, dtype=torch.bfloat16) for model in (attached, literal))
    assert ours[-1] < 0.98 * ours[0]
    assert (ours - theirs).abs().max() <= 1e-2


def test_every_trained_tensor_moves_within_three_steps(pair):
    attached, _, *data = pair
    start = {n: p.detach().clone() for n, p in attached.named_parameters()}
    trained = dict(samfast.trainable_parameters(attached))
    train(attached, *data, steps=3)
    still = {n for n, p in attached.named_parameters() if torch.equal(p, start[n])}
    assert still == set(start) - set(trained)
