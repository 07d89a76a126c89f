# SPDX-License-Identifier: Apache-2.0
"""What users do with a fused Sam of SAMed's: its files, pickles, samfast's calls, shards."""

import copy
import subprocess
import sys
from pathlib import Path

import literal_wrappers as wrappers
import pytest
import torch
from budgets import all_within_budget
from peft_models import DEPTH, block_calls, maps
from torch import nn
from torch.distributed.fsdp import fully_shard
from wrapped_models import moved, photographs, sam, samed

import samfast
from samfast.models import segment


def adapted():
    return moved(wrappers.LoRA_Sam(sam(), 2)).eval()


def small():
    """With a decoder that is quick to save."""
    model = sam()
    model.mask_decoder = nn.Linear(2, 3)
    return wrappers.LoRA_Sam(model, 2)


def test_the_owners_file_is_the_same_and_loads_without_samfast(tmp_path):
    stock, file = moved(small()), tmp_path / "lora.pth"
    stock.save_lora_parameters(tmp_path / "stock.pth")
    samfast.fuse(stock).save_lora_parameters(file)
    pair = [torch.load(tmp_path / name) for name in ("stock.pth", "lora.pth")]
    assert [*pair[0]] == [*pair[1]]
    assert all(torch.equal(pair[0][key], value) for key, value in pair[1].items())
    plain, fused = small(), samfast.fuse(small())
    for model in (plain, fused):
        model.load_lora_parameters(file)
    assert block_calls(fused.sam.image_encoder, photographs()) == DEPTH
    layer = fused.sam.image_encoder.blocks[1].attn.qkv
    assert layer.linear_b_v is fused.w_Bs[3]
    assert torch.equal(layer.linear_b_v.weight, pair[0]["w_b_003"])
    for name, value in stock.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value) or "rel_pos" in name, name


def test_a_whole_sam_and_what_report_says():
    stock = adapted()
    fused, x = samfast.fuse(copy.deepcopy(stock)), photographs()
    with torch.no_grad():
        ours, double = segment(fused, x), copy.deepcopy(stock).double()
        all_within_budget(
            ours, lambda: segment(stock, x), lambda: segment(double, x), torch.float32
        )
    found = samfast.report(fused)
    assert {*found.others.values()} == {"fused: literal_wrappers' _LoRA_qkv"}
    assert {*found.blocks.values()} == {"fused"} and found.backends["lora_linear"]
    count = sum(p.numel() for n, p in fused.named_parameters() if "linear_" in n)
    rest = sum(p.numel() for p in fused.parameters() if p.requires_grad) - count
    assert (found.adapter_parameters, found.other_trained_parameters) == (count, rest)
    assert "  2 x fused: literal_wrappers' _LoRA_qkv" in str(found)


@pytest.mark.slow_on_cpu
def test_a_pickled_model_opens_where_only_its_owner_is_imported(tmp_path):
    fused, x = samfast.fuse(samed()).eval(), maps()
    with torch.no_grad():
        torch.save({"model": fused, "x": x, "y": fused(x)}, tmp_path / "model.pt")
    code = f"""if True:
        import sys, torch
        from samfast.integrations.torchvision import declare_missing_schemas
        declare_missing_schemas()
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        import literal_wrappers
        torch.set_num_threads({torch.get_num_threads()})
        held = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        with torch.no_grad():
            print(torch.equal(held["model"](held["x"]), held["y"]))
        import samfast
        print(set(samfast.report(held["model"]).blocks.values()))
        print(type(samfast.unfuse(held["model"]).blocks[0].attn.qkv) is literal_wrappers._LoRA_qkv)
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True", "{'fused'}", "True"]


def test_calls_of_the_owner_are_named(tmp_path):
    model = samfast.fuse(adapted())
    owners = "the adapters of this (LoRA_)?Sam are literal_wrappers'; "
    with pytest.raises(ValueError, match=owners + r"save them with save_lora_parameters\(file\)"):
        samfast.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=owners + r"save them .* a plain Sam, which can be merged"):
        samfast.merge(model)
    with pytest.raises(ValueError, match=owners + "they add nothing to the loss"):
        samfast.aux_loss(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    match = (
        "blocks.0.attn.qkv already has an adapter, literal_wrappers' _LoRA_qkv; "
        r"samfast.fuse\(model\) fuses it, and load_lora_parameters"
    )
    with pytest.raises(ValueError, match=match):
        samfast.attach(model, samfast.Lora(), train=())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.slow_on_cpu
def test_sharded_after_fuse(tmp_path):
    stock, x = samed(), maps()
    fused = samfast.fuse(copy.deepcopy(stock))
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for block in fused.blocks:
            fully_shard(block, mesh=mesh)
        assert {*samfast.report(fused).blocks.values()} == {"fused"}
        assert block_calls(fused, x) == DEPTH
        double = copy.deepcopy(stock).double()
        all_within_budget(fused(x), lambda: stock(x), lambda: double(x.double()), torch.float32)
    finally:
        torch.distributed.destroy_process_group()


def test_replicas_of_data_parallel():
    """They hold parameters as plain attributes."""
    stock = samed()
    replica = samfast.fuse(copy.deepcopy(stock)).blocks[0].attn.qkv._replicate_for_data_parallel()
    layer = stock.blocks[0].attn.qkv
    for name, child in [*replica._modules.items()]:
        made = child._replicate_for_data_parallel()
        for part, parameter in child._parameters.items():
            setattr(made, part, None if parameter is None else parameter * 1.0)
        replica._modules[name] = made
    assert replica.block_problem() is None
    x, double = maps(), copy.deepcopy(layer).double()
    all_within_budget(replica(x), lambda: layer(x), lambda: double(x.double()), torch.float32)
