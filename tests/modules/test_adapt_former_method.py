# SPDX-License-Identifier: Apache-2.0
"""samfast.AdaptFormer on a model: attach, report, files, fusing, what it refuses."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from budgets import all_within_budget
from segment_anything.modeling.common import MLPBlock
from stock_runs import by_reference

import samfast
from samfast.files.format import CONFIG, TENSORS
from samfast.modules import AdaptFormerMlp

LEAVES = {
    "adapter_layer_norm_before.weight", "adapter_layer_norm_before.bias", "down_proj.weight",
    "down_proj.bias", "up_proj.weight", "up_proj.bias",
}  # fmt: skip
METHOD = samfast.AdaptFormer(bottleneck=8, dropout=0.2)


@pytest.fixture
def attached(tiny_sam, move):
    def make(method=METHOD, fuse=False, **options):
        torch.manual_seed(0)
        model = samfast.attach(tiny_sam(), method, **options)
        return move(samfast.fuse(model) if fuse else model).eval()

    return make


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def layers(model):
    blocks = model.image_encoder.blocks
    return [f"image_encoder.blocks.{i}.mlp" for i in range(len(blocks))]


def test_config_and_options():
    assert samfast.AdaptFormer().config() == {
        "name": "adaptformer",
        "bottleneck": 16,
        "dropout": 0.1,
        "cobot": False,
        "target": "mlp",
    }
    same = samfast.AdaptFormer(bottleneck=8, dropout=0.0, target=".*mlp")
    assert METHOD.same_update(same) and not METHOD.same_update(samfast.AdaptFormer())
    assert not METHOD.same_update(samfast.Lora()) and not samfast.Lora().same_update(METHOD)
    assert not METHOD.same_update(samfast.AdaptFormer(bottleneck=8, cobot=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": 0}, "bottleneck is 0; it must be a whole number of at least 1"),
        ({"bottleneck": True}, "bottleneck is True"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"cobot": 1}, "cobot is 1; it must be True or False"),
        ({"target": ()}, "target is"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        samfast.AdaptFormer(**options)


@pytest.mark.parametrize("fuse", [None, "before", "after"])
def test_attach_starts_as_the_model(tiny_sam, images, fuse):
    """Bit for bit, in training too, and every tensor of the method is trained."""
    stock = samfast.fuse(tiny_sam()) if fuse else tiny_sam()
    expected = stock.image_encoder(images)
    lin1 = stock.image_encoder.blocks[0].mlp.lin1
    if fuse == "after":
        stock = tiny_sam()
        lin1 = stock.image_encoder.blocks[0].mlp.lin1
    model = samfast.attach(stock, METHOD)
    model = samfast.fuse(model) if fuse == "after" else model
    for training in (True, False):
        assert torch.equal(model.train(training).image_encoder(images), expected)
    mlp = model.image_encoder.blocks[0].mlp
    assert type(mlp) is AdaptFormerMlp and mlp.lin1 is lin1 and not lin1.weight.requires_grad
    assert (mlp.bottleneck, mlp.dropout) == (8, 0.2)
    own = {n for n, _ in samfast.trainable_parameters(model) if n.startswith("image_encoder")}
    assert own == {f"{layer}.{leaf}" for layer in layers(model) for leaf in LEAVES}
    states = set(samfast.report(model).blocks.values())
    assert states == ({"fused"} if fuse else {"not fused: still segment_anything's own"})
    assert type(model.mask_decoder.transformer.layers[0].mlp) is MLPBlock


def test_report(attached, monkeypatch):
    monkeypatch.delenv("SAMFAST_BACKEND", raising=False)
    model = attached(fuse=True)
    report, dim = samfast.report(model), model.image_encoder.pos_embed.shape[3]
    each = 2 * dim + 8 * dim + 8 + 8 * dim + dim
    assert report.adapter_parameters == each * len(layers(model))
    assert report.layers == dict.fromkeys(layers(model), "AdaptFormerMlp")
    assert report.backends["adapt_former"] == ("torch",) and report.backends["sam_block"]
    assert "AdaptFormer(bottleneck=8" in str(report)
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    (choice,) = samfast.report(model).backends["adapt_former"]
    assert choice == "triton" or "cannot run adapt_former" in choice


def gradients(model, images):
    y = model.image_encoder(images)
    trained = {n: p for n, p in model.image_encoder.named_parameters() if p.requires_grad}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = torch.autograd.grad(y, list(trained.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(trained, grads, strict=True))}


def test_fused_and_unfused_are_equal_under_the_budget(attached, images):
    model = attached()
    # As a fused block gives its map; in another layout the neck's convolutions round differently.
    first = model.image_encoder.blocks[0]
    first.register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))
    unfused, wide = gradients(model, images), copy.deepcopy(model).double()
    fused = gradients(samfast.fuse(copy.deepcopy(model)), images)
    assert set(fused) == set(unfused)
    stock = by_reference(gradients, model, images)
    exact = by_reference(gradients, wide, images.double())
    all_within_budget(fused, stock, exact, torch.float32)
    back = samfast.unfuse(samfast.fuse(copy.deepcopy(model)))
    assert type(back.image_encoder.blocks[0].mlp) is AdaptFormerMlp
    assert all(torch.equal(v, unfused[n]) for n, v in gradients(back, images).items())
    assert set(back.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("fuse", [False, True])
def test_narrow_base(attached, images, fuse):
    """The branch stays float32, and so do its gradients."""
    model = attached(base_dtype=torch.bfloat16, fuse=fuse)
    for layer in layers(model):
        mlp = model.get_submodule(layer)
        assert mlp.lin1.weight.dtype == torch.bfloat16
        assert {p.dtype for _, p in mlp.adapter_parameters()} == {torch.float32}
    made = gradients(model, images.bfloat16())
    assert made.pop("y").dtype == torch.bfloat16
    assert {g.dtype for g in made.values()} == {torch.float32}
    assert all(g.isfinite().all() and g.any() for g in made.values())


def test_parameter_groups_decay_no_vector(attached):
    model = attached()
    groups = samfast.parameter_groups(model, lr=1e-4, weight_decay=1e-4)
    names = {id(p): n for n, p in samfast.trainable_parameters(model)}
    for group in groups:
        own = {names[id(p)] for p in group["params"]}
        own = {n.partition(".mlp.")[2] for n in own if n.startswith("image_encoder")}
        matrices = {"down_proj.weight", "up_proj.weight"}
        assert own == (matrices if group["weight_decay"] else LEAVES - matrices)


@pytest.mark.parametrize("act", [samfast.merge, samfast.unmerge, samfast.merged_state_dict])
def test_merging_is_refused(attached, act):
    sentence = "blocks.0.mlp is a AdaptFormerMlp, whose update is not linear"
    with pytest.raises(ValueError, match=sentence):
        act(attached())


@pytest.mark.parametrize("fuse", [False, True])
def test_files(attached, tiny_sam, images, tmp_path, fuse):
    model = attached(fuse=fuse)
    folder = samfast.save_adapter(model, tmp_path / "adapter")
    tensors = safetensors.torch.load_file(folder / TENSORS)
    own = {name for name in tensors if name.startswith("image_encoder")}
    assert own == {f"{layer}.{leaf}" for layer in layers(model) for leaf in LEAVES}
    assert "peft_type" not in json.loads((folder / CONFIG).read_text())
    expected = model.image_encoder(images)

    loaded = samfast.load_adapter(tiny_sam(), folder).eval()
    loaded = samfast.fuse(loaded) if fuse else loaded
    assert torch.equal(loaded.image_encoder(images), expected)
    assert samfast.report(loaded).method == METHOD
    assert not any(p.requires_grad for p in loaded.parameters())
    other = samfast.attach(tiny_sam(), samfast.AdaptFormer(bottleneck=8)).eval()
    other = samfast.fuse(other) if fuse else other
    samfast.load_adapter(other, folder, trainable=True)
    assert torch.equal(other.image_encoder(images), expected)
    wider = samfast.attach(tiny_sam(), samfast.AdaptFormer(bottleneck=6))
    with pytest.raises(ValueError, match=r"adapter .* is AdaptFormer.*but the model has AdaptF"):
        samfast.load_adapter(wider, folder)


def test_a_model_without_such_mlps(toy):
    with pytest.raises(ValueError, match=r"'mlp' matches no layer in image_encoder, which has no"):
        samfast.attach(toy(), METHOD)


def test_targets(tiny_sam):
    model = samfast.attach(tiny_sam(), samfast.AdaptFormer(target=r".*blocks\.1\.mlp"))
    assert list(samfast.report(model).layers) == ["image_encoder.blocks.1.mlp"]
    with pytest.raises(ValueError, match=r"MLPBlocks there are image_encoder.blocks.0.mlp"):
        samfast.attach(tiny_sam(), samfast.AdaptFormer(target="qkv"))
    stock = tiny_sam()
    stock.image_encoder.blocks[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks.1.mlp has hooks, which would be lost"):
        samfast.attach(stock, METHOD)
    stock = tiny_sam()
    stock.image_encoder.blocks[1].mlp.__class__ = type("Own", (MLPBlock,), {})
    with pytest.raises(ValueError, match=r"expected a plain MLPBlock, but .*blocks.1.mlp is a Own"):
        samfast.attach(stock, METHOD)
    with pytest.raises(ValueError, match="already has an adapter, AdaptFormerMlp"):
        samfast.attach(samfast.attach(tiny_sam(), METHOD), METHOD)


def test_it_trains(attached, images):
    """All that is trained moves within three steps, and the loss falls."""
    model = attached(fuse=True, train=())
    with torch.no_grad():
        for layer in layers(model):
            model.get_submodule(layer).reset_adapter()
    trained = dict(samfast.trainable_parameters(model))
    before = {n: p.detach().clone() for n, p in trained.items()}
    target = torch.zeros_like(model.image_encoder(images)).detach()
    optimizer = torch.optim.AdamW(samfast.parameter_groups(model, lr=1e-2))
    torch.manual_seed(0)
    losses = []
    for _ in range(4):
        loss = (model.train().image_encoder(images) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, before[n]) for n, p in trained.items())


@pytest.mark.slow
def test_the_core_needs_no_segment_anything():
    code = "import sys, samfast; samfast.AdaptFormer(); sys.exit('segment_anything' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
