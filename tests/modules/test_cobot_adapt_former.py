# SPDX-License-Identifier: Apache-2.0
"""CobotAdaptFormerMlp: published numbers, alone and in fused blocks, files, errors."""

import copy
import pickle

import pytest
import safetensors
import torch
from budgets import all_within_budget, keep
from cobot_files import check, relation_of, state_of
from draws import DEVICE
from segment_anything.modeling.common import MLPBlock
from stock_runs import by_reference
from torch import nn
from torch.utils.checkpoint import checkpoint

import samfast
from samfast import backends
from samfast.kernels._common.budget import Budget
from samfast.methods.cobot.layer import relation
from samfast.models import build_sam
from samfast.modules import CobotAdaptFormerMlp

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


@pytest.mark.slow_on_cpu("cuda", "triton")
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
@pytest.mark.parametrize("backend", backends.NAMES)
def test_golden(backend, together, monkeypatch):
    check("cobot_adaptformer", layers_of, PUBLISHED, backend, together, monkeypatch)


def test_extra_parameters_are_as_many_as_published():
    """Counted in the whole model, on a device without memory."""
    counts = []
    for cobot in (False, True):
        sam = build_sam("vit_b", random_init=True, device="meta")
        samfast.attach(sam, samfast.AdaptFormer(cobot=cobot), train=())
        counts.append(sum(p.numel() for _, p in samfast.trainable_parameters(sam)))
        assert samfast.report(sam).adapter_parameters == counts[-1]
    assert counts[1] - counts[0] == 1296


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
    grads = torch.autograd.grad(loss, list(trained.values()))
    return {"y": y.detach(), **dict(zip(trained, grads, strict=True))}


def test_in_fused_blocks_and_in_parts(tiny_sam, move, one_layout):
    encoder = one_layout(attached(tiny_sam(), move).image_encoder)
    wide = copy.deepcopy(encoder).double()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    stock, exact = (
        by_reference(results, encoder, images),
        by_reference(results, wide, images.double()),
    )
    budget = Budget(stock, exact, torch.float32)
    fused = samfast.fuse(copy.deepcopy(encoder))
    assert set(samfast.report(fused).blocks.values()) == {"fused"}
    keep(budget, results(fused, images))
    for block in fused.blocks:
        block.mlp.down_proj.register_forward_hook(lambda *_: None)
    keep(budget, results(fused, images))


def gradients(encoder, *images):
    """Of one loss over all these forwards, by name."""
    trained = dict(samfast.trainable_parameters(encoder))
    loss = sum(encoder(x).square().sum() for x in images)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.fixture
def without_dropout(tiny_sam, move):
    """In training, and with numbers in all tensors."""
    sam = samfast.attach(tiny_sam(), samfast.AdaptFormer(dropout=0.0, cobot=True), train=())
    return move(sam).image_encoder.train()


@pytest.mark.slow_on_cpu("True-stock", "False-fused")
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(without_dropout, reentrant, fused):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    encoder = samfast.fuse(without_dropout) if fused else without_dropout
    expected = gradients(encoder, images.requires_grad_())
    unchanged, wide = copy.deepcopy(encoder), copy.deepcopy(encoder).double()
    for block in encoder.blocks:
        forward = block.forward
        block.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=reentrant)
    trained = dict(samfast.trainable_parameters(encoder))
    encoder(images).square().sum().backward()  # reentrant ones know no torch.autograd.grad
    summed = {}  # over the layers, in another order
    for name, parameter in trained.items():
        if reentrant and name.endswith(("FacT_c", "FacT_p")):
            summed[name] = parameter.grad
        else:
            assert torch.equal(parameter.grad, expected[name]), name
    stock, exact = (
        by_reference(gradients, unchanged, images),
        by_reference(gradients, wide, images.double()),
    )
    all_within_budget(summed, stock, exact, torch.float32, some=True)


def test_two_forwards_before_a_backward(without_dropout):
    encoder = without_dropout
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(1, 3, 64, 64, generator=generator) for _ in range(2)]
    wide = copy.deepcopy(encoder).double()
    stock = by_reference(gradients, encoder, *images)
    exact = by_reference(gradients, wide, *(x.double() for x in images))
    all_within_budget(gradients(encoder, *images), stock, exact, torch.float32)


def test_copies_and_pickles_share_among_themselves(without_dropout):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = gradients(without_dropout, images)
    for other in (
        copy.deepcopy(without_dropout),
        pickle.loads(pickle.dumps(without_dropout)),
    ):
        layers = [block.mlp for block in other.blocks]
        assert len({id(layer.FacT_p) for layer in layers}) == 1
        assert layers[0].FacT_p is not without_dropout.blocks[0].mlp.FacT_p
        found = gradients(other, images)
        assert all(torch.equal(found[n], expected[n]) for n in expected)


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


def test_what_folds_is_among_the_backends():
    assert CobotAdaptFormerMlp(32, 64).backends()["cobot_fold"] in backends.NAMES


def test_bad_input(tiny_sam):
    with pytest.raises(ValueError, match="bottleneck is 6, but the four parts of a quaternion"):
        samfast.AdaptFormer(bottleneck=6, cobot=True)
    with pytest.raises(
        ValueError, match="slices 3 to 3 are outside the relation matrix, which has 3"
    ):
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
