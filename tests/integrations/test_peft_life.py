# SPDX-License-Identifier: Apache-2.0
"""What users do with a fused PeftModel: PEFT's calls, files, pickles, report, and back again."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from budgets import all_within_budget
from peft_models import (
    DEPTH,
    adapted,
    adapted_encoder,
    block_calls,
    config,
    encoder,
    images,
    maps,
    moved,
    run,
)
from torch import nn
from torch.distributed.fsdp import fully_shard

import samfast
from samfast.models import build_sam, segment

LORA = peft.tuners.lora.Linear


def same(fused, stock, x):
    double = copy.deepcopy(stock).double()
    all_within_budget(fused(x), lambda: stock(x), lambda: double(x.double()), torch.float32)


def test_unfuse_gives_the_same_bits():
    stock = adapted()
    fused, x = copy.deepcopy(stock), maps()
    before = [*fused.modules()]
    assert samfast.fuse(fused) is fused and samfast.fuse(fused) is fused
    assert all(a is b for a, b in zip(before, fused.modules(), strict=True))
    assert isinstance(fused.get_submodule("base_model.model.blocks.0.attn.qkv"), LORA)
    assert samfast.unfuse(fused) is fused
    kinds = [type(module) for module in stock.modules()]
    assert [type(module) for module in fused.modules()] == kinds
    for name, value in run(stock, x).items():
        assert torch.equal(run(fused, x)[name], value), name
    with pytest.raises(ValueError, match="has nothing to unfuse"):
        samfast.unfuse(fused)


def test_unfuse_waits_for_a_replaced_forward():
    fused = samfast.fuse(adapted())
    layer = fused.get_submodule("base_model.model.blocks.0.attn.qkv")
    layer.forward = layer.forward
    with pytest.raises(RuntimeError, match=r"blocks.0.attn.qkv, a FusedLinear, was replaced after"):
        samfast.unfuse(fused)


def test_adapters_come_and_go():
    stock = adapted()
    fused, x = samfast.fuse(copy.deepcopy(stock)), maps()
    for model in (stock, fused):
        model.add_adapter("second", config(r=2, lora_alpha=1))
        moved(model).set_adapter("second")
    assert block_calls(fused, x) == DEPTH
    same(fused, stock, x)
    for model in (stock, fused):
        model.delete_adapter("default")
        model.add_adapter("third", config(target_modules=["qkv"]))
    same(fused, stock, x)
    plain = [copy.deepcopy(model).merge_and_unload() for model in (fused, stock)]
    assert type(plain[0].blocks[0].attn.qkv) is nn.Linear
    assert block_calls(plain[0], x) == DEPTH
    for name, value in plain[1].state_dict().items():
        assert torch.equal(plain[0].state_dict()[name], value), name
    same(*plain, x)


def test_layers_made_later_wait_for_fuse():
    fused, x = samfast.fuse(adapted(target_modules=["qkv"])), maps()
    fused.add_adapter("second", config(target_modules=["lin1"]))
    fused.set_adapter("second")
    assert block_calls(fused, x) == 0
    states = [*samfast.report(fused).others.values()]
    assert states.count("not fused: PEFT's lora.Linear; fuse it with samfast.fuse(model)") == DEPTH
    assert block_calls(samfast.fuse(fused), x) == DEPTH


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_saved_folders_are_the_same(tmp_path):
    stock = adapted_encoder(modules_to_save=["neck.2"])
    stock.save_pretrained(tmp_path / "stock")
    samfast.fuse(stock).save_pretrained(tmp_path / "fused")
    assert "adapter_model.safetensors" in equal_files(tmp_path / "stock", tmp_path / "fused")
    loaded = peft.PeftModel.from_pretrained(encoder(), tmp_path / "fused")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, stock.state_dict()[name]) or "rel_pos" in name, name
    assert block_calls(samfast.fuse(loaded), images()) == DEPTH


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_saved_folders_are_the_same_after_adding_and_deleting(tmp_path):
    stock = adapted_encoder()
    fused = samfast.fuse(copy.deepcopy(stock))
    for kind, model in {"stock": stock, "fused": fused}.items():
        model.add_adapter("second", config(r=2, target_modules=["qkv"]))
        model.delete_adapter("default")
        moved(model).save_pretrained(tmp_path / kind)
    equal_files(tmp_path / "stock" / "second", tmp_path / "fused" / "second")


def equal_files(first, second):
    """The names of both folders' files, whose bytes are equal; PEFT's README is not compared."""
    names = sorted(path.name for path in first.iterdir() if path.name != "README.md")
    assert names == sorted(path.name for path in second.iterdir() if path.name != "README.md")
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    return names


@pytest.mark.slow_on_cpu
def test_a_pickled_model_opens_where_only_samfast_is_imported(tmp_path):
    """And fuse imports no library there that the model has not."""
    fused, x = samfast.fuse(adapted_encoder()).eval(), images()
    with torch.no_grad():
        torch.save({"model": fused, "x": x, "y": fused(x)}, tmp_path / "model.pt")
    code = f"""if True:
        import sys, torch, samfast
        from samfast.integrations.torchvision import declare_missing_schemas
        declare_missing_schemas()
        from samfast.models import build_sam
        sam = samfast.fuse(build_sam("vit_tiny", image_size=64))
        samfast.report(sam), samfast.unfuse(sam)
        print("peft" in sys.modules, "samfast.integrations.peft_layers" in sys.modules)
        torch.set_num_threads({torch.get_num_threads()})
        held = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        with torch.no_grad():
            print(torch.equal(held["model"](held["x"]), held["y"]))
        print(set(samfast.report(held["model"]).blocks.values()))
        print(type(samfast.unfuse(held["model"]).base_model.model.blocks[0].attn.qkv).__name__)
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False False", "True", "{'fused'}", "Linear"]


def test_a_whole_sam_and_what_report_says():
    sam = build_sam("vit_tiny", image_size=64, seed=0)
    sam.image_encoder.blocks = sam.image_encoder.blocks[:2]
    options = {"exclude_modules": ".*mask_decoder.*", "modules_to_save": ["mask_decoder"]}
    stock = moved(peft.get_peft_model(sam, config(**options))).eval()
    fused = samfast.fuse(copy.deepcopy(stock))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        assert segment(fused, x).shape == segment(stock, x).shape
    found = samfast.report(fused)
    assert {*found.others.values()} == {"fused: PEFT's lora.Linear"} and len(found.others) == 8
    assert {*found.blocks.values()} == {"fused"} and found.backends["lora_linear"]
    count = sum(p.numel() for n, p in fused.named_parameters() if "lora_" in n)
    decoder = sum(p.numel() for p in sam.mask_decoder.modules_to_save["default"].parameters())
    assert (found.adapter_parameters, found.other_trained_parameters) == (count, decoder)
    assert re.search(r"layers of others +8 x fused: PEFT's lora\.Linear\n", str(found))


def test_layers_outside_of_sam():
    """fuse takes them with no attention of SAM's in the model, and says what it does not know."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 4, 3))
    stock = moved(peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"])))
    fused, x = samfast.fuse(copy.deepcopy(stock)), torch.randn(5, 3, 2, 2)
    double = copy.deepcopy(stock).double()
    all_within_budget(
        run(fused, x), lambda: run(stock, x), lambda: run(double, x.double()), torch.float32
    )
    assert [*samfast.report(fused).others.values()] == [
        "not fused: PEFT's lora.Conv2d, which samfast does not know",
        "fused: PEFT's lora.Linear",
    ]
    samfast.unfuse(fused)


def test_calls_of_the_owner_are_named(tmp_path):
    model = samfast.fuse(adapted_encoder())
    owners = "the adapters of this PeftModel are PEFT's; "
    with pytest.raises(ValueError, match=owners + r"save them with PEFT's model.save_pretrained"):
        samfast.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=owners + r"fold them in with PEFT's model.merge_and_un"):
        samfast.merge(model)
    with pytest.raises(ValueError, match=owners + "they add nothing to the loss"):
        samfast.aux_loss(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    match = r"blocks.0.attn.qkv already has an adapter, PEFT's lora.Linear; samfast.fuse\(model\)"
    with pytest.raises(ValueError, match=match):
        samfast.attach(model, samfast.Lora(), train=())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_sharded_after_fuse(tmp_path):
    """report says of sharded weights what a forward does with them."""
    stock, x = adapted(), maps()
    fused = samfast.fuse(copy.deepcopy(stock))
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for block in fused.base_model.model.blocks:
            fully_shard(block, mesh=mesh)
        assert {*samfast.report(fused).blocks.values()} == {"fused"}
        assert block_calls(fused, x) == DEPTH
        same(fused, stock, x)
    finally:
        torch.distributed.destroy_process_group()
