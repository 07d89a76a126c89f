# SPDX-License-Identifier: Apache-2.0
"""One small encoder for each method, and a step of training on it."""

import torch

import samfast

METHODS = {
    "lora": samfast.Lora(rank=2),
    "qkv-lora": samfast.Lora(rank=2, slices=("q", "v")),
    "conv-lora": samfast.ConvLora(rank=3, experts=3),
    "conv-lora-depthwise": samfast.ConvLora(rank=3, experts=3, depthwise=True),
    "cobot-lora": samfast.CobotLora(rank=4),
    "adaptformer": samfast.AdaptFormer(bottleneck=8, dropout=0.0),
    "cobot-adaptformer": samfast.AdaptFormer(bottleneck=8, cobot=True, dropout=0.0),
    "kronecker": samfast.Kronecker(n=4),
    "ta-lora": samfast.TaLora(tasks=2, ranks=(4, 4, 2), dropout=0.0, orthogonality=0.1),
}


def adapted(sam, name, move, fused=True):
    """Two blocks with adapters that matter, in training mode; move: the fixture."""
    encoder = sam.image_encoder
    encoder.blocks = encoder.blocks[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samfast.attach(encoder, METHODS[name], train=())
    move(encoder)
    return (samfast.fuse(encoder) if fused else encoder).train()


def step(encoder, images):
    """The loss of a step and all gradients by name, with the same noise at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        encoder.zero_grad()
        y = encoder(images)
        loss = (y * torch.randn(y.shape)).sum() + samfast.aux_loss(encoder)
        loss.backward()
    grads = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name} differs"
