# SPDX-License-Identifier: Apache-2.0
"""segment, encode, decode and aux_loss on a PeftModel, also where PEFT trains the decoder whole."""

import copy

import peft
import pytest
import torch
from peft_models import block_calls, config
from torch import nn

import samfast
from samfast.models import binary_head, build_sam, decode, encode, segment

DEPTH = 2
WHOLE = {"target_modules": ["qkv"], "modules_to_save": ["mask_decoder"]}


@pytest.fixture(scope="module")
def _sam():
    sam = build_sam("vit_tiny", image_size=64, seed=0)
    sam.image_encoder.blocks = sam.image_encoder.blocks[1:3]
    return sam


@pytest.fixture
def sam(_sam):
    return lambda: copy.deepcopy(_sam)


@pytest.fixture
def images():
    return 255 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def trained(model):
    """A PeftModel whose trained weights differ from those at the start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(model):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def test_the_trained_copy_of_the_decoder_runs(sam, images):
    model = trained(peft.get_peft_model(sam(), config(**WHOLE)))
    twin = copy.deepcopy(model).get_base_model()
    twin.mask_decoder = twin.mask_decoder.modules_to_save["default"]
    with torch.no_grad():
        ours = segment(model, images)
        assert torch.equal(ours, segment(twin, images))
        assert torch.equal(ours, decode(model, encode(model, images), (64, 64)))
        assert torch.equal(segment(model, images, decoder_chunk=1), ours)
        with model.disable_adapter():
            assert torch.equal(segment(model, images), segment(sam(), images))
        assert not torch.equal(ours, segment(sam(), images))


def test_the_trained_copy_gets_the_gradients(sam, images):
    model = trained(peft.get_peft_model(sam(), config(**WHOLE)))
    unread = samfast.report(model).unread
    assert any(".modules_to_save.default.iou_prediction_head." in name for name in unread)
    segment(model, images).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert with_gradient == wanted - {f"base_model.model.{name}" for name in unread}
    assert any(".modules_to_save.default.transformer." in name for name in with_gradient)


def test_an_adapter_on_the_patch_embedding(sam, images):
    """PEFT's lora.Conv2d runs itself; the blocks run fused."""
    targets = ["patch_embed.proj", "qkv"]
    stock = trained(peft.get_peft_model(sam(), config(target_modules=targets)))
    fused = samfast.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        assert block_calls(lambda x: segment(fused, x), images) == DEPTH
        assert segment(fused, images).shape == segment(stock, images).shape
        assert segment(stock, images[:0]).shape == (0, 1, 64, 64)


def test_the_loss_of_samfasts_adapters_inside_a_peft_model(sam, images):
    inner = samfast.attach(sam(), samfast.ConvLora(rank=4), train=())
    model = peft.get_peft_model(inner, config(target_modules=["lin2"]))
    for layer in samfast.adapters.adapter.adapters(inner).values():
        layer.requires_grad_(True)
    segment(model.train(), images)
    loss = samfast.aux_loss(model)
    assert loss.requires_grad and torch.equal(loss, samfast.aux_loss(inner))


def test_a_head_comes_before_peft(sam):
    with pytest.raises(ValueError, match=r"call binary_head before peft\.get_peft_model"):
        binary_head(peft.get_peft_model(sam(), config(**WHOLE)))
    model = peft.get_peft_model(binary_head(sam()), config(**WHOLE))
    assert samfast.models.head_of(model) == "binary"
    with pytest.raises(ValueError, match=r"call restore_head before peft\.get_peft_model"):
        samfast.models.restore_head(model)


def test_a_wrapped_prompt_encoder_and_encoder(sam, images):
    whole = ["mask_decoder", "prompt_encoder", "neck"]
    options = {"target_modules": ["qkv"], "modules_to_save": whole}
    model = trained(peft.get_peft_model(sam(), config(**options)))
    boxes = torch.tensor([[[4.0, 4, 40, 50], [8, 8, 60, 60]]])
    y = segment(model, images, boxes)
    y.square().mean().backward()
    assert y.shape == (1, 2, 64, 64)
    prompts = model.get_base_model().prompt_encoder.modules_to_save["default"]
    assert isinstance(prompts, nn.Module) and prompts.no_mask_embed.weight.grad is not None
