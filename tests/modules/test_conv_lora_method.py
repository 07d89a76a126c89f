# SPDX-License-Identifier: Apache-2.0
"""samfast.ConvLora on a model: attach, report, files, merging, parameter groups."""

import copy
import json

import pytest
import safetensors.torch
import torch

import samfast
from samfast.files.format import CONFIG, TENSORS
from samfast.kernels.conv_experts import conv_lora
from samfast.methods.conv_lora import checks
from samfast.modules import ConvLoraLinear

LAYERS = [f"image_encoder.blocks.{i}.attn.qkv" for i in (0, 1)]


@pytest.fixture
def attached(toy, move):
    def make(**options):
        torch.manual_seed(0)
        options = {"rank": 2, "experts": 3, **options}
        return move(samfast.attach(toy(), samfast.ConvLora(**options)))

    return make


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_defaults_are_the_authors():
    method = samfast.ConvLora()
    assert method.config() == {
        "name": "conv-lora",
        "rank": 3,
        "alpha": 32,
        "experts": 8,
        "depthwise": False,
        "dropout": 0.0,
        "target": "qkv",
        "top_k": 1,
        "formula": "code",
    }


def test_attach_starts_as_the_model_and_passes_every_option(toy, images):
    stock = toy()
    expected = stock(images)
    weight = stock.image_encoder.blocks[0].attn.qkv.weight
    method = samfast.ConvLora(
        rank=2, alpha=6, experts=3, depthwise=True, dropout=0.1, top_k=2, formula="paper"
    )
    model = samfast.attach(stock, method)
    assert torch.equal(model(images), expected)
    layer = model.image_encoder.blocks[0].attn.qkv
    assert type(layer) is ConvLoraLinear and layer.weight is weight
    assert (layer.rank, layer.alpha, layer.experts, layer.depthwise) == (2, 6, 3, True)
    assert (layer.dropout, layer.top_k, layer.formula) == (0.1, 2, "paper")
    assert samfast.report(model).backends["conv_experts"] == ("reference",)


def test_report_counts_and_names_what_runs(attached, monkeypatch):
    monkeypatch.delenv("SAMFAST_BACKEND", raising=False)
    report = samfast.report(attached())
    each = 2 * 12 + 36 * 2 + 3 * (2 * 2 * 9 + 2) + 2 * 2 * 3
    assert report.adapter_parameters == 2 * each
    assert report.layers == dict.fromkeys(LAYERS, "ConvLoraLinear")
    assert set(report.backends) == {"lora_linear", "conv_experts", "expert_gate"}
    assert "ConvLora(rank=2, alpha=32, experts=3" in str(report)
    monkeypatch.setenv("SAMFAST_BACKEND", "torch")
    report = samfast.report(attached())
    assert set(report.backends.values()) == {("torch",)}


def test_a_backend_that_cannot_run_says_why(attached, monkeypatch):
    layer = attached().image_encoder.blocks[0].attn.qkv.double()
    monkeypatch.setenv("SAMFAST_BACKEND", "cpu")
    found = layer.backends()
    assert "C++ code takes float32" in found["conv_experts"] and found["expert_gate"] == "torch"
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    assert all("cannot run" in sentence for sentence in layer.backends().values())
    monkeypatch.delenv("SAMFAST_BACKEND")
    assert set(layer.backends().values()) == {"torch"}


def test_parameter_groups_decay_no_bias(attached):
    model = attached()
    decayed, spared = samfast.parameter_groups(model, lr=1e-4, weight_decay=1e-4)
    assert decayed["weight_decay"] == 1e-4 and spared["weight_decay"] == 0
    names = {id(p): n for n, p in samfast.trainable_parameters(model)}
    groups = [{names[id(p)].rpartition(".")[2] for p in g["params"]} for g in (decayed, spared)]
    assert {"lora_A", "lora_B", "expert_weight", "w_gate", "w_noise"} <= groups[0]
    assert "expert_bias" in groups[1] and "expert_bias" not in groups[0]
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize("act", [samfast.merge, samfast.unmerge, samfast.merged_state_dict])
def test_merging_is_refused(attached, act):
    sentence = f"{LAYERS[0]} is a ConvLoraLinear, whose update depends on its input"
    with pytest.raises(ValueError, match=sentence):
        act(attached())


@pytest.mark.parametrize("depthwise", [False, True], ids=["full", "depthwise"])
def test_files_hold_the_published_names(attached, toy, images, tmp_path, depthwise):
    model = attached(depthwise=depthwise).eval()
    folder = samfast.save_adapter(model, tmp_path / "adapter")
    tensors = safetensors.torch.load_file(folder / TENSORS)
    own = {name for name in tensors if name.startswith("image_encoder")}
    leaves = {"lora_A", "lora_B"}
    leaves |= {f"lora_moe_gating.{name}" for name in ("w_gate", "w_noise", "mean", "std")}
    leaves |= {f"lora_moe_experts.{i}.0.{k}" for i in range(3) for k in ("weight", "bias")}
    assert own == {f"{layer}.{leaf}" for layer in LAYERS for leaf in leaves}
    assert tensors[f"{LAYERS[0]}.lora_moe_gating.std"] == 1
    assert "peft_type" not in json.loads((folder / CONFIG).read_text())

    stock = samfast.load_adapter(toy(), folder)
    assert torch.equal(stock(images), model(images))
    assert not any(p.requires_grad for p in stock.parameters())
    other = attached(depthwise=depthwise, dropout=0.2).eval()
    for parameter in other.parameters():
        if parameter.requires_grad:
            torch.nn.init.ones_(parameter)
    samfast.load_adapter(other, folder, trainable=True)
    assert torch.equal(other(images), model(images))
    trained = dict(samfast.trainable_parameters(model))
    assert trained.keys() == dict(samfast.trainable_parameters(other)).keys()
    assert samfast.save_adapter(other, tmp_path / "again").is_dir()
    again = safetensors.torch.load_file(tmp_path / "again" / TENSORS)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_an_adapter_of_a_cast_base_fits_the_original(attached, toy, move, tmp_path):
    cast = samfast.attach(toy(), samfast.ConvLora(rank=2, experts=3), base_dtype=torch.bfloat16)
    folder = samfast.save_adapter(move(cast), tmp_path / "cast")
    samfast.load_adapter(toy(), folder)
    samfast.load_adapter(attached(), folder)
    layer = samfast.load_adapter(toy(), folder, base_dtype=torch.bfloat16).image_encoder.blocks[0]
    assert layer.attn.qkv.weight.dtype == torch.bfloat16
    assert layer.attn.qkv.expert_weight.dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"alpha": 2},
        {"experts": 2},
        {"depthwise": True},
        {"top_k": 2},
        {"formula": "paper"},
    ],
    ids=str,
)
def test_another_update_is_refused(attached, tmp_path, options):
    folder = samfast.save_adapter(attached(), tmp_path / "adapter")
    model = attached(**options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"adapter .* is ConvLora.*but the model has ConvLora"):
        samfast.load_adapter(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lora = samfast.Lora(rank=2)
    assert not lora.same_update(samfast.ConvLora()) and not samfast.ConvLora().same_update(lora)
    assert samfast.ConvLora(alpha=None).same_update(samfast.ConvLora(alpha=3, target="proj"))


def test_the_formulas_are_those_of_the_operation():
    assert checks.FORMULAS == conv_lora.FORMULAS


def test_another_gate_is_refused_and_changes_nothing(attached, toy, tmp_path, monkeypatch):
    from samfast.methods.conv_lora import layer

    monkeypatch.setitem(layer._CONSTANTS, "lora_moe_gating.std", 2.0)
    folder = samfast.save_adapter(attached(), tmp_path / "adapter")
    monkeypatch.undo()
    stock = toy()
    with pytest.raises(ValueError, match=r"lora_moe_gating.std is \[2.0\], but the gate's noise"):
        samfast.load_adapter(stock, folder)
    assert samfast.report(stock).method is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"experts": 1.5}, "experts is 1.5"),
        ({"depthwise": None}, "depthwise is None"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"target": ()}, "target is"),
        ({"top_k": 0}, "top_k is 0"),
        ({"formula": 3}, "formula is 3"),
    ],
)
def test_bad_options_end_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        samfast.ConvLora(**options)


def test_a_layer_too_small_is_named(toy):
    with pytest.raises(ValueError, match=f"{LAYERS[0]}: rank 13 is above 12"):
        samfast.attach(toy(), samfast.ConvLora(rank=13))
