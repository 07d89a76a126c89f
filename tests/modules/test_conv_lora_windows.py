# SPDX-License-Identifier: Apache-2.0
"""Conv-LoRA on qkv of padded windows: in image order, as where the windows are cut out."""

import copy

import pytest
import torch
from sam_layers import DEVICE, block
from torch import nn

import samfast
from samfast.modules import ConvLoraLinear, SamBlock


def blocks(depthwise=False):
    """A stock block with Conv-LoRA on qkv and its fused form, in training, all of it trained."""
    stock = block(4)
    layer = ConvLoraLinear.from_linear(stock.attn.qkv, rank=4, experts=3, depthwise=depthwise)
    torch.manual_seed(7)
    for name in ("lora_B", "expert_bias", "w_gate", "w_noise"):
        nn.init.normal_(layer.get_parameter(name), std=0.3)
    stock.attn.qkv = layer
    return stock.train(), SamBlock.from_block(copy.deepcopy(stock)).train()


def step(model, x, dy):
    """Result, balancing loss and every gradient; the gate's noise is drawn from one seed."""
    x = x.to(DEVICE).requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    aux = samfast.aux_loss(model)
    torch.autograd.backward([y, 50.0 * aux], [dy.to(DEVICE), None])
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "aux": aux.detach(), "dx": x.grad} | grads


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(("height", "width"), [(6, 7), (3, 3), (8, 4)])
def test_training_step(height, width, depthwise, backend, monkeypatch):
    """dB, the bottleneck's and the gate's gradients hold what comes from the padding."""
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    stock, ours = blocks(depthwise)
    assert ours.window_order() is None
    generator = torch.Generator().manual_seed(2)
    x, dy = (
        torch.randn(2, height, width, 32, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    expected, made = step(stock, x, dy), step(ours, x, dy)
    for name, exact in expected.items():
        error = (made[name] - exact).abs().max()
        assert error <= torch.finfo(torch.float32).eps * exact.abs().max(), name
        assert exact.any(), name
