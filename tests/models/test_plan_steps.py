# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps of a fused encoder with launch plans: bit for bit those without."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import samfast
from samfast.integrations import segment_anything
from samfast.kernels._common import planned
from samfast.kernels.sam_block.op import SamBlock

ALL = ("qkv", "proj", "lin1", "lin2")
METHODS = {
    "lora": samfast.Lora(rank=2, target=ALL, dropout=0.1),
    "slices": samfast.Lora(rank=2, slices=("q", "v")),
    "conv-lora": samfast.ConvLora(rank=2, experts=3),
    "cobot": samfast.CobotLora(rank=4),
    "ta-lora": samfast.TaLora(tasks=2, ranks=(4, 4, 2)),
    "adaptformer": samfast.AdaptFormer(bottleneck=4, cobot=True),
}
STEPS = 20


def trained(method, steps, memory="fast"):
    """All tensors after some steps, and what the loss was at each."""
    torch.manual_seed(0)
    encoder = segment_anything.load().modeling.image_encoder.ImageEncoderViT(
        img_size=48, embed_dim=16, depth=2, num_heads=1, out_chans=4, use_rel_pos=True,
        window_size=2, global_attn_indexes=(1,),
    )  # fmt: skip
    samfast.attach(encoder, method, train=())
    samfast.fuse(encoder, memory=memory).train()
    optimizer = torch.optim.AdamW(samfast.trainable_parameters(encoder), 1e-2)
    losses = []
    for step in range(steps):
        if isinstance(method, samfast.TaLora):
            samfast.set_task(encoder, step % 2)
        images = torch.randn(1 + step % 2, 3, 48, 48)  # two sizes of batches by turns
        loss = encoder(images).square().mean()
        if (more := samfast.aux_loss(encoder)) is not None:
            loss = loss + more
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {**encoder.state_dict(), "losses": torch.stack(losses)}


def check(monkeypatch, method, backend, steps=STEPS, **options):
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    planned.clear()
    with planned.switched(False):
        expected = trained(method, steps, **options)
    found = trained(method, steps, **options)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    made = [len([k for k in body.known.values() if k and k.plans]) for body in SamBlock.bodies]
    assert made[1:] == [4, 4], [body.refused for body in SamBlock.bodies]
    planned.clear()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_steps(monkeypatch, method):
    """By the C++ code, which the second call of each kind records too."""
    check(monkeypatch, method, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_interpreted_steps(monkeypatch, name):
    check(monkeypatch, METHODS[name], "triton", STEPS if name in ("lora", "conv-lora") else 6)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["balanced", "minimal"])
def test_interpreted_steps_that_compute_again(monkeypatch, memory):
    check(monkeypatch, METHODS["conv-lora"], "triton", 6, memory=memory)
