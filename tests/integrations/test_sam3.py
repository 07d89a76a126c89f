# SPDX-License-Identifier: Apache-2.0
"""SAM 3's blocks: what they have that no other library's have."""

import copy
import importlib.util
import inspect
import sys

import pytest
import torch
from other_blocks import KINDS, maps, meta, sam3_of_transformers, vitdet
from peft_models import block_calls
from torch import nn

import samfast
from samfast.fused import proof

X = maps(dtype=torch.float32, grid=(5, 5))


def gradients(block, x):
    x = x.detach().requires_grad_()
    y = block(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], dy)]


class Mlp(nn.Module):
    """As the package has it since SAM 3.1: linear and activation in one, without gradients."""

    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=(0.0, 0.0), **_):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.drop1, self.norm, self.drop2 = nn.Dropout(drop[0]), nn.Identity(), nn.Dropout(drop[1])
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        if torch.is_grad_enabled():
            raise ValueError("Expected grad to be disabled.")
        x = self.act(nn.functional.linear(x, self.fc1.weight.detach(), self.fc1.bias.detach()))
        return self.fc2(self.drop1(x))


def test_a_block_that_refuses_gradients_trains_fused(monkeypatch):
    """The file of blocks once more, as a module of its own, with the newer MLP in it."""
    released = vitdet()
    spec = importlib.util.spec_from_file_location("sam3.model.vitdet", released.__file__)
    newer = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sam3.model.vitdet", newer)
    spec.loader.exec_module(newer)
    exec(inspect.getsource(Mlp), vars(newer))
    options = {"mlp_ratio": 2.0, "use_rope": True, "input_size": (5, 5), "window_size": 3}
    torch.manual_seed(0)
    stock, own = released.Block(32, 2, **options), newer.Block(32, 2, **options)
    own.load_state_dict(stock.state_dict())
    with pytest.raises(ValueError, match="grad to be disabled"):
        own(X)
    fused = samfast.fuse(nn.Sequential(own))
    assert samfast.report(fused).blocks == {"0": "fused"}
    for ours, theirs in zip(gradients(own, X), gradients(stock, X), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [0, 1], ids=["windows", "map"])
def test_dropped_branches_are_those_that_the_stock_block_drops(position):
    stock = meta(drop_path_rate=0.5).blocks[1]
    if position == 0:
        stock.drop_path.drop_prob = 1.0  # nothing is left but x
    fused = samfast.fuse(copy.deepcopy(stock))
    x = torch.cat([X] * 4)
    for mode in (True, False):
        found = []
        for block in (fused.train(mode), stock.train(mode)):
            torch.manual_seed(7)
            found.append(gradients(block, x))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert block_calls(fused.train(), x) == 1


def test_a_map_of_another_size_gets_the_stock_answer():
    """Windows take any map; a block over the whole map has positions for one size."""
    for name in ("sam3", "meta"):
        windows, whole = KINDS[name].of(KINDS[name].encoder())
        other = maps(dtype=torch.float32, grid=(7, 4))
        expected = windows(other)
        torch.testing.assert_close(samfast.fuse(windows)(other), expected, rtol=1e-4, atol=1e-5)
        errors = []
        for block in (copy.deepcopy(whole), samfast.fuse(whole)):
            with pytest.raises((RuntimeError, AssertionError)) as error:
                block(other)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


LEFT_ALONE = {
    "rope is off": (lambda b: setattr(b.attn, "use_rope", False), "meta", "use_rope=False"),
    "layer scale": (lambda b: setattr(b, "ls1", nn.PReLU()), "meta", "ls1 is torch's PReLU"),
    "a cast": (
        lambda b: setattr(b.attn, "freqs_cis", b.attn.freqs_cis.real),
        "meta",
        "a cast lost its imaginary part",
    ),
    "scaled otherwise": (
        lambda b: setattr(b.drop_path, "scale_by_keep", False),
        "meta",
        "drop_path is timm's DropPath, not timm's DropPath as it is made",
    ),
    "causal": (lambda b: setattr(b.attention, "is_causal", True), "sam3", "causal"),
    "another attention": (
        lambda b: setattr(b.attention.config, "_attn_implementation", "flex_attention"),
        "sam3",
        "its attention is 'flex_attention'",
    ),
}


@pytest.mark.parametrize("change, name, reason", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_left_alone(change, name, reason):
    block = (
        meta(drop_path_rate=0.5).blocks[1] if name == "meta" else KINDS[name].encoder().layers[1]
    )
    samfast.fuse(block)
    change(block)
    assert reason in samfast.report(block).blocks[""]


def test_a_layer_made_alone_has_the_eager_attention():
    transformers = pytest.importorskip("transformers")
    from transformers.models.sam3 import modeling_sam3

    config = transformers.Sam3ViTConfig(
        hidden_size=32, intermediate_size=72, num_attention_heads=2, image_size=80, patch_size=16,
        window_size=3,
    )  # fmt: skip
    layer = modeling_sam3.Sam3ViTLayer(config, 3)
    assert layer.attention.config._attn_implementation is None
    expected = layer(X)
    samfast.fuse(layer)
    assert block_calls(layer, X) == 1
    torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-5)


def test_tables_follow_their_buffers():
    """Positions that change in place, or are other tensors, are seen at the next forward."""
    block = sam3_of_transformers("sdpa").layers[1]
    fused = samfast.fuse(copy.deepcopy(block))
    fused(X)
    for change in (lambda b: b.rotary_emb.inv_freq.mul_(2.0), lambda b: b.position_ids.add_(1.5)):
        before = fused(X)
        change(block), change(fused)
        torch.testing.assert_close(fused(X), block(X), rtol=1e-4, atol=1e-5)
        assert not torch.equal(fused(X), before) or change is None
    samfast.unfuse(fused)
    assert vars(fused).keys() == vars(block).keys()


def test_positions_that_are_other_tensors_are_seen():
    """A cast, a move and a copy of a position put other tensors in the buffers' place."""
    stock = sam3_of_transformers("sdpa").layers[1]
    fused = samfast.fuse(copy.deepcopy(stock))
    fused(X)
    for block in (stock, fused):
        block.position_ids = block.position_ids + 1.5
        block.rotary_emb = copy.deepcopy(block.rotary_emb)
    torch.testing.assert_close(fused(X), stock(X), rtol=1e-4, atol=1e-5)
    for block in (stock, fused):
        block.rotary_emb.attention_scaling = 2.0
    torch.testing.assert_close(fused(X), stock(X), rtol=1e-4, atol=1e-5)
    x = X.bfloat16()
    ours, theirs = fused.bfloat16()(x), stock.bfloat16()(x)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    assert fused.to("meta")(x.to("meta")).shape == x.shape


def test_a_forward_in_inference_mode_leaves_training_possible():
    block = samfast.fuse(sam3_of_transformers("sdpa").layers[1])
    with torch.inference_mode():
        expected = block(X)
    found, *_ = gradients(block, X)
    torch.testing.assert_close(found, expected.clone())


@pytest.mark.parametrize(
    "changed", [{"hidden_act": "relu"}, {"attention": "flex_attention"}], ids=["act", "attention"]
)
def test_a_model_that_is_left_alone_says_nothing_of_another(changed, monkeypatch):
    monkeypatch.setattr(proof, "_verdicts", {})
    kept = samfast.fuse(sam3_of_transformers(**{"attention": "sdpa", **changed}))
    reasons = {*samfast.report(kept).blocks.values()}
    assert reasons in (
        {"not fused: the activation is ReLU(), not the exact GELU"},
        {"not fused: its attention is 'flex_attention', not one of eager, sdpa"},
    )
    fused = samfast.fuse(sam3_of_transformers("sdpa"))
    assert {*samfast.report(fused).blocks.values()} == {"fused"}


# Adapters


def tracker():
    """A Sam3TrackerModel of 80 pixels."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.sam3 import modeling_sam3  # noqa: F401 - its blocks' classes

    vit = transformers.Sam3ViTConfig(
        hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=2,
        image_size=80, pretrain_image_size=40, patch_size=16, window_size=3,
        global_attn_indexes=[1],
    )  # fmt: skip
    vision = transformers.Sam3VisionConfig(
        backbone_config=vit, fpn_hidden_size=16, backbone_feature_sizes=[[20, 20], [10, 10], [5, 5]]
    )
    config = transformers.Sam3TrackerConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 16, "image_size": 80, "patch_size": 16},
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 32,
                             "iou_head_hidden_dim": 16},
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Sam3TrackerModel(config)


METHODS = {
    "lora": samfast.Lora(rank=2, target=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")),
    "q and v": samfast.Lora(rank=2, target=("q_proj", "v_proj")),
    "conv-lora": samfast.ConvLora(rank=2, experts=2, target=("q_proj", "v_proj")),
}


def masks(model, x):
    found = model.eval()(x, input_boxes=torch.tensor([[[8.0, 8.0, 40.0, 50.0]]]))
    return found.pred_masks


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_adapters_of_the_encoder_alone_and_their_file(method, tmp_path):
    model = samfast.attach(tracker(), method, train=())
    layers = samfast.report(model).layers
    assert len(layers) == 2 * len(method.target)
    assert all(name.startswith("vision_encoder.backbone.layers.") for name in layers)
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(model):
            parameter += 0.1 * torch.randn(parameter.shape)
    x = torch.randn(1, 3, 80, 80)
    expected = masks(model, x)
    samfast.fuse(model)
    assert {*samfast.report(model).blocks.values()} == {"fused"}
    assert block_calls(model, x, input_boxes=torch.zeros(1, 1, 4)) == 2
    torch.testing.assert_close(masks(model, x), expected, rtol=1e-4, atol=1e-4)
    samfast.save_adapter(model, tmp_path / "adapter")
    other = samfast.load_adapter(tracker(), tmp_path / "adapter")
    torch.testing.assert_close(masks(other, x), expected, rtol=1e-4, atol=1e-4)


def with_words():
    """A Sam3Model of 112 pixels, which takes words."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_attention_heads": 2}
    layers = {**small, "num_layers": 1, "intermediate_size": 64}
    vit = {**small, "model_type": "sam3_vit_model", "intermediate_size": 72, "window_size": 4,
           "num_hidden_layers": 2, "image_size": 112, "pretrain_image_size": 56, "patch_size": 14,
           "global_attn_indexes": [1]}  # fmt: skip
    words = {**small, "vocab_size": 100, "intermediate_size": 64, "projection_dim": 32,
             "num_hidden_layers": 1, "max_position_embeddings": 16, "bos_token_id": 1,
             "eos_token_id": 2}  # fmt: skip
    config = transformers.Sam3Config(
        vision_config={
            "backbone_config": vit,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config=words,
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": 5},
        mask_decoder_config=small,
    )
    torch.manual_seed(0)
    return transformers.Sam3Model(config).train()


def test_the_model_that_takes_words_keeps_its_own_loop():
    stock = with_words()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    ours = samfast.attach(copy.deepcopy(stock), samfast.Lora(target=("q_proj", "fc1")), train=())
    assert all("vision_encoder.backbone" in name for name in samfast.report(ours).layers)
    samfast.fuse(ours)
    x, words = torch.randn(2, 3, 112, 112), {"input_ids": torch.randint(3, 90, (2, 8))}
    assert block_calls(ours, x, **words) == 2
    found = []
    for model in (ours, stock):
        weight = model.vision_encoder.backbone.embeddings.position_embeddings.requires_grad_()
        torch.manual_seed(5)
        masks = model(x, **words).pred_masks
        found.append((masks.detach(), *torch.autograd.grad(masks.square().sum(), weight)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_adapters_of_the_authors_model_are_put_into_its_encoder_alone(tmp_path):
    """Names as in the package: backbone.vision_backbone.trunk, beside other layers called qkv."""

    def made():
        torch.manual_seed(0)
        model, text = nn.Module(), nn.Module()
        text.qkv = nn.Linear(8, 8)
        model.backbone = nn.Module()
        model.backbone.language_backbone = text
        model.backbone.vision_backbone = nn.Module()
        model.backbone.vision_backbone.trunk = KINDS["meta"].encoder()
        return model

    def run(model):
        return model.backbone.vision_backbone.trunk(torch.ones(1, 3, 80, 80))[0]

    model = samfast.attach(made(), samfast.Lora(rank=2), train=())
    layers = samfast.report(model).layers
    assert [*layers] == [f"backbone.vision_backbone.trunk.blocks.{i}.attn.qkv" for i in range(2)]
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(model):
            parameter += 0.1
    expected = run(model)
    samfast.save_adapter(samfast.fuse(model), tmp_path / "adapter")
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    other = samfast.load_adapter(made(), tmp_path / "adapter")
    torch.testing.assert_close(run(other), expected, rtol=1e-4, atol=1e-4)


def test_the_authors_model_is_the_same_base_at_another_image_size(tmp_path, recwarn):
    """Its positions are a buffer of the state dict, complex and of the map's size."""
    block = vitdet().Block
    options = {"mlp_ratio": 2.0, "use_rope": True, "window_size": 0}
    torch.manual_seed(0)
    small = nn.Sequential(block(32, 2, input_size=(4, 4), **options))
    large = nn.Sequential(block(32, 2, input_size=(5, 5), **options))
    weights = {n: t for n, t in small.state_dict().items() if "freqs_cis" not in n}
    assert large.load_state_dict(weights, strict=False).missing_keys == ["0.attn.freqs_cis"]
    attached = samfast.attach(small, samfast.Lora(rank=2), train=())
    samfast.save_adapter(attached, tmp_path / "adapter")
    samfast.load_adapter(large, tmp_path / "adapter")
    assert not [w for w in recwarn if "imaginary" in str(w.message)]
