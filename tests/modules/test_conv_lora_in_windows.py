# SPDX-License-Identifier: Apache-2.0
"""Conv-LoRA on qkv in windows that stand over the map, against the literal method.

Its experts and gate see the padding, so gradients reach lora_B, the experts and the gate from
there. The fused block never cuts a window out; the stock block gives the literal layer windows.
"""

import copy
from functools import partial

import pytest
import torch
from budgets import all_within_budget, within_budget
from draws import DEVICE
from literal_conv_lora import LiteralConvLora
from sam_layers import block
from stock_runs import by_reference
from torch import nn

import samfast
from samfast.modules import ConvLoraLinear, RelPosAttention, SamBlock

WINDOWS = 2 * 4
# What the gate draws decides for an expert clearly, so that rounding does not.
CHOSEN = torch.randint(0, 3, (WINDOWS,), generator=torch.Generator().manual_seed(2))
NOISE = 3.0 * nn.functional.one_hot(CHOSEN, 3) - torch.rand(
    WINDOWS, 3, generator=torch.Generator().manual_seed(3)
)


class Literal(LiteralConvLora):
    def forward(self, x):
        noise = NOISE.to(x.device) if self.training else None
        y, self.loss = super().forward(x, noise)
        return y


@pytest.fixture
def fixed_noise(monkeypatch):
    def draw(like, samples, experts, generator=None):
        assert (samples, experts) == tuple(NOISE.shape)
        return NOISE.to(like.device)

    monkeypatch.setattr("samfast.methods.conv_lora.layer.draw_noise", draw)


def blocks(training, **options):
    """(fused, stock) with equal values; of the base, the bias and the tables are trained."""
    stock = block(4)
    torch.manual_seed(0)
    layer = ConvLoraLinear.from_linear(stock.attn.qkv, rank=2, alpha=2, experts=3, **options)
    for name in ("lora_B", "expert_bias", "w_gate", "w_noise"):
        nn.init.normal_(layer.get_parameter(name), std=0.3)
    stock.requires_grad_(False)
    fused = SamBlock.from_block(copy.deepcopy(stock))
    fused.attn.qkv = layer
    stock.attn.qkv = Literal(layer)
    for model in (fused, stock):
        model.train(training)
        trained = [p for n, p in model.attn.named_parameters() if "lora_" in n or "expert" in n]
        trained += [model.attn.qkv.w_gate, model.attn.qkv.w_noise, model.attn.qkv.bias]
        for parameter in (*trained, model.attn.rel_pos_h, model.attn.rel_pos_w):
            parameter.requires_grad_(True)
    return fused, stock


def run(model, dtype):
    """{"y", "dx", every trained parameter} of y · dy plus the balancing loss."""
    model = copy.deepcopy(model).to(DEVICE, dtype)
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 2, 6, 7, 32, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    y = model(x.requires_grad_())
    literal = isinstance(model.attn.qkv, Literal)
    aux = model.attn.qkv.loss if literal else samfast.aux_loss(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not model.training:
        named = {n: p for n, p in named.items() if ".w_" not in n}
    loss = (y * dy).sum() + 100 * aux
    grads = torch.autograd.grad(loss, [x, *named.values()])
    return dict(zip(["y", "aux", "dx", *named], [y.detach(), aux.detach(), *grads], strict=True))


@pytest.mark.slow_on_cpu("evaluation-torch", "full-training-torch")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("depthwise", [False, True], ids=["full", "depthwise"])
def test_as_the_literal_block(training, depthwise, backend, fixed_noise, monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    fused, stock = blocks(training, depthwise=depthwise)
    assert fused.window_order() is None
    exact = partial(run, stock, torch.float64)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        ours = run(fused, dtype)
        assert set(ours) == set(exact()) and ours["attn.qkv.lora_B"].any()
        all_within_budget(ours, partial(run, stock, dtype), exact, dtype)


def test_dropout_and_the_padding(fixed_noise):
    """Dropout acts on the adapter's input, and the padding's is zero: cut first, or not at all."""
    fused, _ = blocks(True, dropout=0.5)
    zeros = torch.zeros(2, 6, 7, 32, dtype=torch.float64, device=DEVICE)
    y, pad_h, pad_b = fused.attn.qkv.forward_windows(zeros, 4)
    windows = torch.zeros(WINDOWS, 4, 4, 32, dtype=torch.float64, device=DEVICE)
    cut = by_reference(lambda: fused.attn.qkv(windows)[[0, 1], [0, 0], [0, 3]])
    rows = fused.attn.qkv.bias + pad_h @ pad_b.mT
    assert rows.shape == (2 * (8 * 8 - 6 * 7), 96) and y.shape == (2, 6, 7, 96)
    within_budget(torch.stack([y[0, 0, 0], rows[0]]), cut, cut, torch.float64)


def test_both_checkpoint_modes(fixed_noise):
    fused, _ = blocks(True)
    expected = run(fused, torch.float32)
    for reentrant in (False, True):
        model = copy.deepcopy(fused).to(DEVICE, torch.float32)
        generator = torch.Generator().manual_seed(1)
        x, dy = torch.randn(2, 2, 6, 7, 32, generator=generator, dtype=torch.float64).float()
        x, dy = x.to(DEVICE).requires_grad_(), dy.to(DEVICE)
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        ((y * dy).sum() + 100 * samfast.aux_loss(model)).backward()
        actual = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert torch.equal(x.grad, expected["dx"])
        assert all(torch.equal(grad, expected[name]) for name, grad in actual.items())


def test_whole_windows_are_the_literal_too(fixed_noise):
    """Fused attention alone, in a block of segment_anything's own."""
    fused, stock = blocks(True)
    own = copy.deepcopy(stock)
    own.attn = RelPosAttention.from_attention(copy.deepcopy(stock.attn))
    own.attn.qkv = fused.attn.qkv
    of_stock, exact = (partial(run, stock, dtype) for dtype in (torch.float32, torch.float64))
    all_within_budget(run(own, torch.float32), of_stock, exact, torch.float32)
