# SPDX-License-Identifier: Apache-2.0
"""PEFT reads plain LoRA folders of samfast, and samfast reads those of PEFT."""

import copy
import json
import warnings

import pytest
import safetensors.torch
import torch
from budgets import keep, within_budget
from stock_runs import by_reference

import samfast
from samfast.adapters.adapter import adapters
from samfast.adapters.wrappers import unwrapped
from samfast.integrations import peft as files
from samfast.kernels._common.budget import Budget
from samfast.models import segment

peft = pytest.importorskip("peft")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(8)
    return torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8, generator=generator)


def by_peft(model, folder):
    """PEFT's model around a stock one; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.slow_on_cpu("alone", "used")
@pytest.mark.parametrize(
    "method, train",
    [
        (samfast.Lora(rank=4), ("mask_decoder",)),
        (samfast.Lora(rank=3, alpha=7.5, target=("qkv", "lin2")), ()),
        (
            samfast.Lora(rank=2, alpha=1, dropout=0.2, target="proj"),
            ("mask_decoder.output_hypernetworks_mlps", "image_encoder.neck", "prompt_encoder"),
        ),
        (
            samfast.Lora(rank=4),
            (
                "mask_decoder.transformer",
                "mask_decoder.iou_token",
                "mask_decoder.mask_tokens",
                "mask_decoder.output_upscaling",
                "mask_decoder.output_hypernetworks_mlps.0",
            ),
        ),
    ],
    ids=["decoder", "alone", "parts", "used"],
)
def test_peft_loads_our_folder(tiny_sam, move, images, tmp_path, method, train):
    sam = move(samfast.attach(tiny_sam(), method, train=train), std=0.03)
    folder = samfast.save_adapter(sam, tmp_path / "adapter")
    wrapped = by_peft(tiny_sam(), folder)
    with torch.no_grad():
        ours, before = segment(sam, images), segment(tiny_sam(), images)
    theirs = by_reference(segment, wrapped.base_model.model, images)
    exact = by_reference(segment, copy.deepcopy(sam).double(), images)
    budget = Budget(theirs, exact, torch.float32)
    keep(budget, [ours])
    assert (ours - before).abs().max() > 100 * (ours - budget.stock["0"]).abs().max()
    stored = safetensors.torch.load_file(folder / TENSORS)
    written = wrapped.state_dict()
    assert set(files.to_key(name) for name in dict(sam.named_parameters())) >= set(stored) - {
        files.to_key(name) for name, _ in sam.named_buffers()
    }
    matched = 0
    for name, layer in adapters(sam).items():
        for factor in ("lora_A", "lora_B"):
            key = f"base_model.model.{name}.{factor}.default.weight"
            assert torch.equal(written[key], getattr(layer, factor))
            matched += 1
    assert matched == sum(".lora_" in key for key in stored)
    found = {key for key in written if ".modules_to_save.default." in key}
    for key in found:
        assert torch.equal(written[key], stored[key.replace("modules_to_save.default.", "")])
    assert len(found) + matched == len(stored)


@pytest.mark.slow_on_cpu("regex-decoder")
@pytest.mark.slow_on_cpu("regex-alone", "list-decoder")
@pytest.mark.parametrize("whole", [None, ["mask_decoder"]], ids=["alone", "decoder"])
@pytest.mark.parametrize("targets", [["qkv"], r".*blocks\.[02]\.mlp\.lin\d"], ids=["list", "regex"])
def test_we_load_a_folder_of_peft(tiny_sam, images, tmp_path, whole, targets):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, modules_to_save=whole)
    wrapped = peft.get_peft_model(tiny_sam(), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path)
    sam = samfast.load_adapter(tiny_sam(), tmp_path)
    with torch.no_grad():
        ours = segment(sam, images)
    theirs = by_reference(segment, wrapped.base_model.model, images)
    exact = by_reference(segment, copy.deepcopy(sam).double(), images)
    within_budget(ours, theirs, exact, torch.float32)
    stored = safetensors.torch.load_file(tmp_path / TENSORS)
    names = dict(sam.named_parameters())
    assert all(torch.equal(names[files.from_key(key)], value) for key, value in stored.items())
    method = samfast.report(sam).method
    assert (method.rank, method.alpha) == (4, 6)
    record = samfast.read_adapter_config(tmp_path)
    assert record["base_digest"] is None and set(record["layers"]) == set(adapters(sam))


def test_both_directions_give_the_same_tensors(tiny_sam, move, tmp_path):
    sam = move(samfast.attach(tiny_sam(), samfast.Lora(rank=2, alpha=3)))
    first = samfast.save_adapter(sam, tmp_path / "ours")
    by_peft(tiny_sam(), first).save_pretrained(tmp_path / "theirs")
    again = samfast.load_adapter(tiny_sam(), tmp_path / "theirs")
    attached = samfast.attach(tiny_sam(), samfast.Lora(rank=2, alpha=3))
    samfast.load_adapter(attached, tmp_path / "theirs")
    for model in (again, attached):
        for (name, value), (other, expected) in zip(
            model.state_dict().items(), sam.state_dict().items(), strict=True
        ):
            assert name == other and torch.equal(value, expected)


@pytest.mark.parametrize(
    "method, train",
    [
        ({"slices": ("q", "v")}, ()),
        ({}, ("image_encoder.pos_embed",)),  # a parameter that is no module
        ({}, ("image_encoder.blocks.0.attn.qkv",)),  # the adapted layer's own weight
        ({}, ("image_encoder.blocks.0",)),  # a module with adapters inside
        ({}, ("mask_decoder.norm.weight",)),  # half a module
    ],
    ids=str,
)
def test_what_peft_cannot_express_has_no_peft_type(toy, tmp_path, method, train):
    model = samfast.attach(toy(), samfast.Lora(rank=2, **method), train=train)
    folder = samfast.save_adapter(model, tmp_path / "adapter")
    assert "peft_type" not in json.loads((folder / CONFIG).read_text())
    with pytest.raises((ValueError, KeyError, TypeError)):
        by_peft(toy(), folder)
    samfast.load_adapter(toy(), folder)


def test_modules_to_save_covers_exactly_what_is_trained(toy):
    model = toy()
    names = {name for name, _ in model.named_parameters()}
    inside = {name for name in names if name.startswith("image_encoder.")}
    assert files.modules_to_save(model, set()) == []
    assert files.modules_to_save(model, names - inside) == ["mask_decoder"]
    assert files.modules_to_save(model, inside) == ["image_encoder"]
    blocks = {name for name in names if ".blocks." in name}
    assert files.modules_to_save(model, blocks) == [f"image_encoder.blocks.{i}" for i in (0, 1)]
    assert files.modules_to_save(model, {"mask_decoder.lin1.bias"}) is None
    model.other = torch.nn.Sequential()
    model.other.mask_decoder = torch.nn.Linear(2, 2)  # PEFT would take it for mask_decoder
    assert files.modules_to_save(model, names - inside) == [
        "mask_decoder.norm",
        "mask_decoder.lin1",
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "its peft_type is 'LOHA'; samfast reads only PEFT's LORA"),
        ({"use_dora": True}, "its option use_dora is True, which samfast cannot read"),
        ({"bias": "all"}, "its option bias is 'all'"),
        ({"rank_pattern": {"a": 2}}, "its option rank_pattern is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"r": None}, "rank is None"),
        ({"lora_alpha": "x"}, "alpha is 'x'"),
        ({"r": 3}, r"lora_A of shape \(2, 12\), but in the model it is \(3, 12\)"),
    ],
    ids=str,
)
def test_other_folders_of_peft_end_in_a_sentence(toy, tmp_path, change, message):
    wrapped = peft.get_peft_model(toy(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    wrapped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
    model = toy()
    with pytest.raises(ValueError, match=message):
        samfast.load_adapter(model, tmp_path)
    assert not adapters(model)


def test_a_convolution_that_peft_adapted_is_refused(toy, tmp_path):
    targets = ["patch_embed.proj"]
    wrapped = peft.get_peft_model(toy(), peft.LoraConfig(r=2, target_modules=targets))
    wrapped.save_pretrained(tmp_path)
    match = "adapts image_encoder.patch_embed.proj, a Conv2d, but samfast adapts only nn.Linear;"
    with pytest.raises(ValueError, match=match):
        samfast.load_adapter(toy(), tmp_path)


def test_a_rank_stabilised_scale_is_read(toy, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["qkv"])
    wrapped = peft.get_peft_model(toy(), config)
    wrapped.save_pretrained(tmp_path)
    loaded = adapters(samfast.load_adapter(toy(), tmp_path))
    for name, layer in loaded.items():
        assert layer.scaling == pytest.approx(
            wrapped.get_submodule(f"base_model.model.{name}").scaling["default"]
        )


def test_an_empty_folder_of_peft_is_refused(toy, tmp_path):
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 2}')
    safetensors.torch.save_file({"mask_decoder.lin1.bias": torch.zeros(1)}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="it holds no lora_A and lora_B"):
        samfast.load_adapter(toy(), tmp_path)


def test_peft_models_are_looked_through(tiny_sam, images):
    sam = tiny_sam()
    model = peft.get_peft_model(sam, peft.LoraConfig(r=2, target_modules=["qkv"]))
    assert unwrapped(model) is sam
    with torch.no_grad():
        assert torch.equal(segment(model, images), segment(sam, images))
    with pytest.raises(ValueError, match=r"of this Sam are PEFT's; save them with"):
        samfast.save_adapter(model, "nowhere")
