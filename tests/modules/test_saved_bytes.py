# SPDX-License-Identifier: Apache-2.0
"""What a fused encoder keeps for its backward at 1024², counted on tensors without memory."""

import pytest
import torch

import samfast
from benchmarks import saved
from benchmarks.peers import sharing
from samfast.counters import counting, saved_bytes
from samfast.kernels.sam_block.block import Block
from samfast.kernels.sam_block.plan import MEMORY
from samfast.models import build_sam

MOST = {"vit_b": 1.10, "vit_l": 1.10, "vit_h": 1.05}  # of the floor, for "fast"
DTYPE = torch.bfloat16
# Closed, which takes half the time: what it keeps is what it is seen to give. One test opens it.
ATTENTION = (
    "samfast::window_relpos_attention_forward",
    "samfast::window_relpos_attention_backward",
)


@pytest.fixture(scope="module", params=MOST)
def model(request):
    """Name and encoder, built once."""
    return request.param, saved.encoder(request.param, DTYPE)


@pytest.mark.slow_on_cpu(but=["vit_b-fast"])
@pytest.mark.parametrize("memory", MEMORY)
def test_little_more_than_the_floor(model, memory, monkeypatch):
    """By what is passed to autograd, and by what is alive after the forward; for "minimal" with
    what is kept of the one block that is made again, while its gradients are."""
    name, encoder = model
    fused = samfast.fuse(sharing(encoder), memory=memory)
    images = torch.empty(1, 3, 1024, 1024, dtype=DTYPE, device="meta")
    known = [images, *fused.parameters(), *fused.buffers()]
    closed = () if (name, memory) == ("vit_b", "fast") else ATTENTION
    found = saved_bytes(lambda: fused(images), known, closed)
    assert found.living == found.hooks
    again = made_again(fused, monkeypatch) if memory == "minimal" else 0
    most = MOST[name] if memory == "fast" else 1.10
    assert found.hooks + again <= most * saved.floor(fused, memory, DTYPE)


@pytest.mark.slow_on_cpu(but=["cobot-lora-fast"])
@pytest.mark.parametrize("memory", ["fast", "minimal"])
@pytest.mark.parametrize(
    ("method", "width"),
    [(samfast.CobotLora(), 2 * 4), (samfast.AdaptFormer(cobot=True), 16)],
    ids=["cobot-lora", "cobot-adaptformer"],
)
def test_little_more_than_the_floor_and_the_bottleneck(method, width, memory, monkeypatch):
    """Under SAM-COBOT: what blocks keep, and ``width`` elements a token of a bottleneck."""
    sam = build_sam("vit_b", random_init=True, device="meta")
    samfast.attach(sam, method, train=(), base_dtype=DTYPE)
    fused = samfast.fuse(sam.image_encoder, memory=memory)
    assert set(samfast.report(fused).blocks.values()) == {"fused"}
    images = torch.empty(1, 3, 1024, 1024, dtype=DTYPE, device="meta")
    known = [images, *fused.parameters(), *fused.buffers()]
    found = saved_bytes(lambda: fused(images), known, ATTENTION)
    assert found.living == found.hooks
    again = made_again(fused, monkeypatch) if memory == "minimal" else 0
    kept = len(fused.blocks) if memory == "fast" else 1
    own = kept * (fused.img_size // 16) ** 2 * width * DTYPE.itemsize
    assert found.hooks + again <= 1.10 * (saved.floor(fused, memory, DTYPE) + own)


def made_again(encoder, monkeypatch):
    """The most bytes of what a block's backward makes again and keeps, with windows or without."""
    again, kept = Block._again, []

    def noted(self):
        of_block, of_layers = again(self)
        tensors = [*of_block, *(t for layer in of_layers for t in layer)]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        kept.append(sum(storages.values()))
        return of_block, of_layers

    monkeypatch.setattr(Block, "_again", noted)
    side, dim = encoder.img_size // 16, encoder.pos_embed.shape[3]
    for windowed in (True, False):
        layer = next(b for b in encoder.blocks if (b.window_size > 0) == windowed)
        x = torch.empty(1, side, side, dim, dtype=DTYPE, device="meta", requires_grad=True)
        y = layer(x)
        with counting(ATTENTION):  # looks into the operators, which are but shapes otherwise
            y.backward(torch.empty_like(y))
    assert len(kept) == 2 and min(kept) > 0
    return max(kept)
