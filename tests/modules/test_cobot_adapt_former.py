# SPDX-License-Identifier: Apache-2.0
"""CobotAdaptFormerMlp: published numbers, alone and in fused blocks, files, errors."""

import copy

import pytest
import safetensors
import torch
from budgets import all_within_budget
from cobot_files import DEVICE, check, relation_of, state_of
from segment_anything.modeling.common import MLPBlock
from torch import nn

import samfast
from samfast import backends
from samfast.modules import CobotAdaptFormerMlp
from samfast.modules.cobot import relation

# The authors' state-dict names, by the file's names inside a block.
PUBLISHED = {
    "norm.weight": "adapter_layer_norm_before.weight",
    "norm.bias": "adapter_layer_norm_before.bias",
    "down.weight": "down_proj.weight",
    "down.bias": "down_proj.bias",
    "up.weight": "up_proj.weight",
    "up.bias": "up_proj.bias",
    "gamma": "gamma",
    **{f"head.{c}": f"FacT_d1.{c}_weight" for c in "rijk"},
}


def layers_of(tensors, dtype):
    """The file's three layers; its MLP is one linear layer, so the second is the identity."""
    shared = relation_of(tensors, dtype)
    layers = []
    for i in range(3):
        layer = CobotAdaptFormerMlp(
            32, 32, nn.Identity, 16, 0.1, shared, i, device=DEVICE, dtype=dtype
        )
        state = state_of(tensors, f"block{i}", PUBLISHED)
        state |= {"lin1.weight": tensors[f"block{i}.mlp.weight"], "lin2.weight": torch.eye(32)}
        state |= {"lin1.bias": tensors[f"block{i}.mlp.bias"], "lin2.bias": torch.zeros(32)}
        layer.load_state_dict(state)
        for linear in (layer.lin1, layer.lin2):
            linear.requires_grad_(False)
        layers.append(layer.eval())
    return layers


@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
@pytest.mark.parametrize("backend", backends.NAMES)
def test_golden(backend, together, monkeypatch):
    check("cobot_adaptformer", layers_of, PUBLISHED, backend, together, monkeypatch)


def test_extra_parameters_are_as_many_as_published(tiny_sam):
    width = 12 * (16 + 4 * 16) + 16 * 12 + 12 * 12  # ViT-B: gammas, heads, C and P
    assert width == 1296
    plain, cobot = (
        samfast.attach(tiny_sam(), samfast.AdaptFormer(cobot=cobot), train=())
        for cobot in (False, True)
    )
    more = samfast.report(cobot).adapter_parameters - samfast.report(plain).adapter_parameters
    blocks = len(cobot.image_encoder.blocks)
    assert more == blocks * (16 + 4 * 16) + 16 * blocks + blocks**2


def test_reset_is_the_published_start(tiny_sam, move):
    """Of the shared relation nothing: it is the model's, not this layer's."""
    layer = attached(tiny_sam(), move).image_encoder.blocks[1].mlp
    relation_before = layer.FacT_c.detach().clone()
    layer.reset_adapter()
    assert (layer.gamma == 1).all() and not layer.heads[:, 0].any()
    rest = layer.heads[:, 1:]
    assert rest.min() >= 0 and rest.max() < 1 and len(rest.unique()) > rest.numel() / 2
    assert not layer.up_proj.weight.any() and layer.down_proj.weight.abs().max() <= 192**-0.5
    assert torch.equal(layer.FacT_c, relation_before)


def attached(sam, move):
    samfast.attach(sam, samfast.AdaptFormer(cobot=True), train=())
    move(sam)
    return sam.eval()


def results(encoder, images):
    trained = dict(samfast.trainable_parameters(encoder))
    y = encoder(images)
    generator = torch.Generator().manual_seed(2)
    loss = (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
    return [y.detach(), *torch.autograd.grad(loss, list(trained.values()))]


def test_in_fused_blocks_and_in_parts(tiny_sam, move):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    encoder = attached(tiny_sam(), move).image_encoder
    stock = results(encoder, images)
    exact = results(copy.deepcopy(encoder).double(), images.double())
    fused = samfast.fuse(copy.deepcopy(encoder))
    assert set(samfast.report(fused).blocks.values()) == {"fused"}
    names = [str(i) for i in range(len(exact))]
    all_within_budget(results(fused, images), stock, exact, torch.float32, names)
    for block in fused.blocks:
        block.mlp.down_proj.register_forward_hook(lambda *_: None)
    all_within_budget(results(fused, images), stock, exact, torch.float32, names)


def test_files(tiny_sam, move, tmp_path):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    sam = attached(tiny_sam(), move)
    samfast.save_adapter(sam, tmp_path / "adapter")
    with safetensors.safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert sum(name.endswith("FacT_c") for name in names) == 1
    assert "image_encoder.blocks.1.mlp.FacT_d1.k_weight" in names
    assert not any("lin1" in name or "lin2" in name for name in names)
    other = tiny_sam()
    samfast.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other.eval().image_encoder(images), sam.image_encoder(images))


def test_bad_input(tiny_sam):
    with pytest.raises(ValueError, match="bottleneck is 6, but the four parts of a quaternion"):
        samfast.AdaptFormer(bottleneck=6, cobot=True)
    with pytest.raises(ValueError, match="slices 3 to 3 are outside the relation matrix of 3"):
        shared = relation(16, 3, torch.empty(0))
        CobotAdaptFormerMlp(32, 64, shared=shared, index=3)
    mlp = MLPBlock(32, 64)
    for index in (1.0, "1", True, -1):
        sentence = rf"index is {index!r}; it must be a whole number of at least 0"
        with pytest.raises(ValueError, match=sentence):
            CobotAdaptFormerMlp(32, 64, index=index)
        with pytest.raises(ValueError, match=sentence):
            CobotAdaptFormerMlp.from_mlp(mlp, index=index)
    sam = samfast.attach(tiny_sam(), samfast.AdaptFormer(cobot=True))
    with pytest.raises(ValueError, match="CobotAdaptFormerMlp, whose update is not linear"):
        samfast.merge(sam)
