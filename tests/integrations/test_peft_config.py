# SPDX-License-Identifier: Apache-2.0
"""attach with PEFT's LoraConfig: the layers and scales of get_peft_model, or a sentence."""

import copy
import dataclasses
import warnings

import peft
import pytest
import torch
from budgets import within_budget
from peft.tuners.lora import LoraLayer
from stock_runs import by_reference
from torch import nn

import samfast
from samfast.adapters.adapter import adapters
from samfast.methods.attach import find_layers
from samfast.models import build_sam, segment

PLACE = "base_model.model."
QKV = {"target_modules": ["qkv"]}
MATCHED = {
    "endings": {"target_modules": ["attn.qkv", "attn.proj", "image_encoder.blocks.0.mlp.lin1"]},
    "decoder": {"target_modules": ["lin1", "q_proj"]},
    "expression": {"target_modules": r".*blocks\.\d\.mlp\.lin[12]"},
    "flags": {"target_modules": "(?i).*QKV"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": ["qkv", "lin2"], "exclude_modules": ["blocks.1.attn.qkv"]},
    "excluded-expression": {"target_modules": ["proj"], "exclude_modules": ".*patch_embed.*"},
    "saved": {"target_modules": ["lin1"], "modules_to_save": ["mask_decoder", "neck.2"]},
    "saved-ending": {"target_modules": ["qkv"], "modules_to_save": ["norm_final_attn"]},
}


@pytest.fixture(scope="module")
def _sam():
    sam = build_sam("vit_tiny", image_size=64, seed=0)
    sam.image_encoder.blocks = sam.image_encoder.blocks[1:3]
    return sam


@pytest.fixture
def sam(_sam):
    return lambda: copy.deepcopy(_sam)


def config(**options):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **options})


def trained_by_peft(model):
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    names = [name.removeprefix(PLACE).replace("modules_to_save.default.", "") for name in names]
    return {name.replace(".default.weight", "") for name in names}


@pytest.mark.parametrize("options", MATCHED.values(), ids=MATCHED)
def test_the_same_layers_as_peft(sam, options):
    if peft.__version__.startswith("0.15.") and "mask_decoder" in options.get(
        "modules_to_save", ()
    ):
        pytest.skip("PEFT 0.15 also adapts layers of modules that it trains whole")
    ours = samfast.attach(sam(), config(**options))
    theirs = peft.get_peft_model(sam(), config(**options))
    inside = theirs.get_base_model().named_modules()
    assert {*adapters(ours)} == {name for name, m in inside if isinstance(m, LoraLayer)}
    assert {name for name, _ in samfast.trainable_parameters(ours)} == trained_by_peft(theirs)
    method = samfast.report(ours).method
    assert {*find_layers(sam(), method)} == {*adapters(ours)}


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_peft_reads_what_was_attached_by_its_config(sam, tmp_path, rslora):
    options = {"use_rslora": rslora, "lora_dropout": 0.1, "modules_to_save": ["mask_decoder"]}
    made = config(**QKV, **options)
    ours = samfast.attach(sam(), made)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(ours):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    images = 255 * torch.rand(1, 3, 64, 64, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = samfast.save_adapter(ours, tmp_path / "adapter")
        theirs = peft.PeftModel.from_pretrained(sam(), folder).eval()
    twin = peft.get_peft_model(sam(), made)
    for name, layer in adapters(ours).items():
        scales = [m.get_submodule(PLACE + name).scaling["default"] for m in (theirs, twin)]
        assert scales[0] == layer.scaling and scales[1] == pytest.approx(layer.scaling)
        assert layer.dropout == made.lora_dropout
    with torch.no_grad():
        within_budget(
            segment(ours.eval(), images),
            by_reference(segment, theirs, images),
            by_reference(segment, copy.deepcopy(ours).double(), images),
            torch.float32,
        )
        assert not torch.equal(segment(ours, images), segment(sam(), images))


def test_factors_start_as_the_config_says(sam):
    torch.manual_seed(0)
    for start in (True, False, "gaussian"):
        layers = adapters(samfast.attach(sam(), config(init_lora_weights=start, **QKV))).values()
        a, b = (torch.stack([getattr(m, n) for m in layers]) for n in ("lora_A", "lora_B"))
        theirs = peft.get_peft_model(sam(), config(init_lora_weights=start, **QKV))
        other = [m for m in theirs.modules() if isinstance(m, LoraLayer)]
        for mine, part in ((a, "lora_A"), (b, "lora_B")):
            spread = torch.stack([getattr(m, part)["default"].weight for m in other]).std()
            assert mine.std().item() == pytest.approx(spread.item(), rel=0.1), (start, part)


def test_what_is_trained_whole_is_said_once(sam):
    made = config(**QKV, modules_to_save=["mask_decoder"])
    with pytest.raises(ValueError, match=r"train is 'x' and modules_to_save is \['mask_decoder'\]"):
        samfast.attach(sam(), made, train="x")
    model = samfast.attach(sam(), config(**QKV), train="image_encoder.neck")
    assert samfast.report(model).other_trained_parameters > 0
    plain = samfast.attach(sam(), samfast.Lora())
    assert any("mask_decoder" in name for name, _ in samfast.trainable_parameters(plain))


def test_names_inside_a_wrapper(sam):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.sam = sam()

    for target in (r"sam\.image_encoder\..*qkv", ["sam.image_encoder.blocks.0.attn.qkv"]):
        model = samfast.attach(Holder(), config(target_modules=target))
        assert "sam.image_encoder.blocks.0.attn.qkv" in adapters(model)
        method = samfast.report(model).method
        assert len(find_layers(sam(), method)) == len(adapters(model))


REFUSED = [
    (
        QKV | {"bias": "all"},
        r"LoraConfig has bias='all', which samfast.attach cannot do; call peft.get",
    ),
    (QKV | {"use_dora": True}, "has use_dora=True"),
    (QKV | {"lora_bias": True}, "has lora_bias=True"),
    (QKV | {"fan_in_fan_out": True}, "has fan_in_fan_out=True"),
    (QKV | {"rank_pattern": {"qkv": 2}}, r"has rank_pattern=\{'qkv': 2\}"),
    (QKV | {"alpha_pattern": {"qkv": 2}}, "has alpha_pattern="),
    (
        QKV | {"layers_to_transform": [0]},
        r"layers_to_transform=\[0\].*; name the layers in target_",
    ),
    (QKV | {"layers_to_transform": 0}, r"layers_to_transform=0, .*; name the layers in target_"),
    (
        QKV | {"modules_to_save": ["["]},
        r"modules_to_save \['\['\] has a name that is not a reg",
    ),
    (QKV | {"modules_to_save": [3]}, "modules_to_save has 3, which is not the name of a module"),
    (QKV | {"inference_mode": True}, "inference_mode=True.*; set it to False to train, or load"),
    (QKV | {"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS', for which PEFT trains a classifier too"),
    (
        QKV | {"init_lora_weights": "pissa"},
        "init_lora_weights='pissa', but samfast.attach takes True",
    ),
    (QKV | {"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal', but"),
    (QKV | {"r": 0}, "rank is 0; it must be a whole number"),
    (QKV | {"lora_alpha": 0}, "alpha is 0; it must be a finite number above 0"),
    (QKV | {"lora_alpha": None}, "lora_alpha is None; it must be a finite number above 0"),
    (QKV | {"modules_to_save": ["x"]}, "modules_to_save names 'x', but no module with param"),
    (QKV | {"modules_to_save": "neck"}, "modules_to_save is 'neck'; pass a list of names"),
    ({}, r"target_modules is None, but PEFT has no default for SAM; name layers, such as"),
    (
        {"target_modules": ["qqv"]},
        r"target_modules \['qqv'\] match no layer; linear layers there a",
    ),
    ({"target_modules": "(qkv"}, r"target_modules '\(qkv' is not a regular expression: missing \)"),
    (
        QKV | {"exclude_modules": ["qkv"]},
        "match 2 layers, but exclude_modules or modules_to_save l",
    ),
    (
        {"target_modules": ["proj"]},
        "target_modules also match image_encoder.patch_embed.proj, a Conv2d, but samfast.attach "
        'adapts only nn.Linear; write "attn.proj" instead of "proj"',
    ),
    (
        {"target_modules": "all-linear", "r": 8},
        r"layers\.2: rank 8 is above 4, .*; exclude_modules leaves layers out",
    ),
    ({"target_modules": ".*proj"}, "a Conv2d, .*; leave it out with exclude_modules"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_not_plain_ends_in_a_sentence(sam):
    model = sam()
    for options, sentence in REFUSED:
        with pytest.raises(ValueError, match=sentence) as error:
            samfast.attach(model, config(**options))
        assert "LoraConfig(" not in str(error.value) and len(str(error.value)) < 240
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_an_option_of_a_later_peft_is_refused(sam):
    @dataclasses.dataclass
    class LoraConfig(peft.LoraConfig):
        use_other_lora: bool = False

    samfast.attach(sam(), LoraConfig(**QKV))
    with pytest.raises(ValueError, match="LoraConfig has use_other_lora=True, which"):
        samfast.attach(sam(), LoraConfig(use_other_lora=True, **QKV))
    made = config(**QKV)
    made._custom_modules = {nn.Linear: nn.Linear}
    with pytest.raises(ValueError, match="LoraConfig has custom modules"):
        samfast.attach(sam(), made)


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.AdaLoraConfig], ids=["loha", "adalora"])
def test_another_method_of_peft_ends_in_a_sentence(sam, kind):
    made = kind(target_modules=["qkv"], **({"total_step": 9} if kind is peft.AdaLoraConfig else {}))
    sentence = f"or PEFT's LoraConfig, got PEFT's {kind.__name__}; call peft.get_peft_model"
    with pytest.raises(TypeError, match=sentence):
        samfast.attach(sam(), made)
