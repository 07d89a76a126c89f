# SPDX-License-Identifier: Apache-2.0
"""What is not plain LoRA runs PEFT's own forward, gives PEFT's numbers, and report says why."""

import copy
import sys

import peft
import pytest
import torch
from budgets import all_within_budget
from peft_models import DEPTH, adapted, block_calls, config, maps, moved, run
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import samfast

QKV = "base_model.model.blocks.0.attn.qkv"


def second(model, **options):
    model.add_adapter("second", config(r=2, **options))
    return moved(model)


def dora():
    return adapted(use_dora=True)


def two_active():
    model = second(adapted())
    model.base_model.set_adapter(["default", "second"])
    return model


def biased():
    model = adapted(lora_bias=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.constant_(parameter, 0.3)
    return model


def hooked():
    model = adapted()
    model.get_submodule(QKV).register_forward_hook(lambda module, args, y: 2 * y)
    return model


def hooked_inside():
    model = adapted()
    down = model.get_submodule(QKV).lora_A["default"]
    down.register_forward_hook(lambda module, args, y: 2 * y)
    return model


def other_base():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = adapted()
    model.get_submodule(QKV).base_layer.__class__ = Doubled
    return model


def other_dropout():
    model = adapted()
    model.get_submodule(QKV).lora_dropout["default"] = nn.Threshold(0.0, 0.5)
    return model


def mixed_dtypes():
    """Factors of the layer alone in another dtype than a float32 base."""
    model = adapted()
    model.get_submodule(QKV).lora_A["default"].double()
    model.get_submodule(QKV).lora_B["default"].double()
    return model


MERGE = "to predict fused, call merge_adapter()"
HOSTILE = {  # a model: the reason, and how many blocks still run as one
    dora: (f"qkv has a variant of LoRA, DoRA; {MERGE}", 0),
    two_active: ("qkv has 2 active adapters; set_adapter(name) leaves one", 0),
    biased: (f"qkv has a bias in its adapter; {MERGE}", 0),
    hooked: ("qkv has hooks or a forward of its own", 1),
    hooked_inside: (
        "qkv has hooks or a forward of its own in its adapter; remove them to fuse it",
        1,
    ),
    other_base: ("qkv is over tests's Doubled, not a plain nn.Linear", 1),
    other_dropout: ("qkv has torch's Threshold before its adapter", 1),
    mixed_dtypes: (
        "qkv has factors of float64 and float64 over a weight of float32; cast them to float32 "
        "to fuse it",
        1,
    ),
}


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_hostile(make):
    reason, calls = HOSTILE[make]
    stock = make()
    fused, x = samfast.fuse(copy.deepcopy(stock)), maps()
    found = samfast.report(fused)
    state = next(iter(found.blocks.values()))
    assert state.startswith("fused in parts: ") and _spoken(state) == f"fused in parts: {reason}"
    assert found.others[QKV].startswith("not fused: PEFT's lora")
    assert block_calls(fused, x) == calls
    double = copy.deepcopy(stock).double()
    all_within_budget(
        run(fused, x), lambda: run(stock, x), lambda: run(double, x.double()), torch.float32
    )


@pytest.mark.parametrize("make", [dora, biased, two_active], ids=lambda make: make.__name__)
def test_the_way_out_that_report_names(make):
    model = samfast.fuse(make()).eval()
    if make is two_active:
        model.set_adapter("default")
    else:
        model.merge_adapter()
    assert block_calls(model, maps()) == DEPTH


def _spoken(state):
    return state.replace(f"{__name__.partition('.')[0]}'s", "tests's")


def test_a_batch_of_several_adapters():
    """On the MLP; PEFT itself cannot take windows in place of images."""
    targets = {"target_modules": ["lin1", "lin2"]}
    stock = second(adapted(**targets), **targets).eval()
    fused, x = samfast.fuse(copy.deepcopy(stock)), maps(3)
    names = ["second", "__base__", "default"]
    assert block_calls(fused, x, adapter_names=names) == 0
    double = copy.deepcopy(stock).double()
    all_within_budget(
        fused(x, adapter_names=names),
        lambda: stock(x, adapter_names=names),
        lambda: double(x.double(), adapter_names=names),
        torch.float32,
    )
    assert block_calls(fused, x) == DEPTH  # once the hooks are gone


@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_merged_disabled_and_none_active_are_plain_linear_layers():
    stock = second(adapted())
    fused, x = samfast.fuse(copy.deepcopy(stock)), maps()

    def same():
        double = copy.deepcopy(stock).double()
        all_within_budget(fused(x), lambda: stock(x), lambda: double(x.double()), torch.float32)

    for model in (stock, fused):
        model.base_model.disable_adapter_layers()
    assert block_calls(fused, x) == DEPTH
    same()
    for model in (stock, fused):
        model.base_model.enable_adapter_layers()
        model.merge_adapter()
    assert block_calls(fused, x) == DEPTH
    same()
    with stock.disable_adapter(), fused.disable_adapter():  # PEFT unmerges at the next forward
        assert "is disabled while it is merged" in next(iter(samfast.report(fused).blocks.values()))
        assert block_calls(fused, x) < DEPTH
        same()
        assert block_calls(fused, x) == DEPTH
    for module in (m for model in (stock, fused) for m in model.modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.delete_adapter("default")
            module._active_adapter = ["absent"]
    assert block_calls(fused, x) == DEPTH
    same()


def test_a_patched_class_is_left_alone(monkeypatch):
    """Before fuse it is not taken; after fuse PEFT's forward runs, which is the patched one."""
    kind = peft.tuners.lora.Linear
    before = adapted()
    fused = samfast.fuse(copy.deepcopy(before))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
    x = maps()
    double = copy.deepcopy(before).double()
    all_within_budget(fused(x), lambda: before(x), lambda: double(x.double()), torch.float32)
    assert block_calls(fused, x) == 0
    assert "another forward than its class had" in next(iter(samfast.report(fused).blocks.values()))
    again = samfast.fuse(adapted())
    all_within_budget(again(x), lambda: before(x), lambda: double(x.double()), torch.float32)
    assert block_calls(again, x) == 0


def test_another_formula_is_found_out(monkeypatch):
    """As a later PEFT might have it: its own code, in its own module."""
    code = "def forward(self, x): return 2 * self.base_layer(x)"
    layer = sys.modules[peft.tuners.lora.Linear.__module__]
    names = {}
    exec(code, vars(layer), names)
    monkeypatch.setattr(layer.Linear, "forward", names["forward"])
    model = samfast.fuse(adapted())
    state = samfast.report(model).others[QKV]
    assert state.startswith("not fused: PEFT's lora.Linear, but its forward gives another output (")
    assert block_calls(model, maps()) == 0


def test_a_weight_that_is_no_plain_tensor():
    """As quantised weights are."""
    fused = samfast.fuse(adapted())
    base = fused.get_submodule(QKV).base_layer
    base.weight = nn.Parameter(TwoTensor(base.weight.data, base.weight.data), requires_grad=False)
    state = next(iter(samfast.report(fused).blocks.values()))
    assert state == "fused in parts: qkv has a weight that is a TwoTensor"


@pytest.mark.parametrize("name", ["__call__", "_cast_input_dtype", "on an instance"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_another_method_than_forward(name, when, monkeypatch):
    kind = peft.tuners.lora.layer.Linear
    stock = adapted()
    fused = copy.deepcopy(stock)
    if when == "after":
        samfast.fuse(fused)
    if name == "on an instance":
        for model in (stock, fused):
            layer = model.get_submodule(QKV)
            layer._cast_input_dtype = lambda x, dtype: 2 * x.to(dtype)
    elif name == "__call__":
        monkeypatch.setattr(kind, name, lambda self, x: 2 * self.forward(x), raising=False)
    else:
        monkeypatch.setattr(kind, name, lambda self, x, dtype: 2 * x.to(dtype))
    if when == "before":
        samfast.fuse(fused)
    layer = fused.get_submodule(QKV)
    x = torch.randn(2, 3, 3, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), stock.get_submodule(QKV)(x))
    assert not samfast.report(fused).others[QKV].startswith("fused")
