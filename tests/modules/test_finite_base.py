# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in a base or in an adapter: refused by name, before anything changes."""

import copy

import pytest
import torch
from every_method import METHODS
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import samfast
from samfast.adapters.adapter import adapters
from samfast.adapters.finite import base_problem, not_finite

NAN, INF = float("nan"), float("inf")
NECK = "image_encoder.neck.0.weight"


def spoil(model, name, value):
    """Put ``value`` at the end of a tensor of the model."""
    with torch.no_grad():
        model.state_dict(keep_vars=True)[name].view(-1)[-1] = value
    return model


@pytest.fixture
def saved(tiny_sam, move, tmp_path):
    """A good adapter of the tiny SAM, and the model that it was saved from."""
    sam = move(samfast.attach(tiny_sam(), samfast.Lora(rank=2)))
    return samfast.save_adapter(sam, tmp_path / "adapter"), sam


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_attach_refuses_a_base_with_nan(tiny_sam, method):
    model = spoil(tiny_sam(), NECK, NAN)
    state = copy.deepcopy(model.state_dict())
    for dtype in (None, torch.float16):
        with pytest.raises(ValueError, match=rf"finite numbers, but {NECK} contains NaN or inf"):
            samfast.attach(model, method, base_dtype=dtype)
        assert not adapters(model) and all(p.requires_grad for p in model.parameters())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.nan_to_num(7.0), state[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("name", ["mask_decoder.lin1.weight", "image_encoder.pos_embed"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_parameter_and_dtype_is_looked_at(toy, name, value, dtype):
    model = spoil(toy().to(dtype), name, value)
    with pytest.raises(ValueError, match=rf"but {name} contains NaN or infinity; load its weights"):
        samfast.attach(nn.Sequential(model), samfast.Lora(rank=2))


def test_a_buffer_may_hold_infinity_but_not_nan(toy):
    model = toy()
    model.register_buffer("mask", torch.full((3,), -INF))
    samfast.attach(model, samfast.Lora(rank=2))
    model = toy()
    model.register_buffer("mask", torch.tensor([INF, -INF]))  # whose sum is NaN
    assert base_problem(model) is None
    spoil(model, "image_encoder.scale", NAN)
    with pytest.raises(ValueError, match=r"but image_encoder\.scale contains NaN; load"):
        samfast.attach(model, samfast.Lora(rank=2))


def test_a_sum_that_overflows_is_not_infinity(toy):
    model = toy().half()
    with torch.no_grad():
        model.image_encoder.pos_embed.fill_(60000)
    assert not model.image_encoder.pos_embed.sum().isfinite()
    samfast.attach(model, samfast.Lora(rank=2))


def test_tensors_without_values_are_not_read(toy):
    samfast.attach(toy().to("meta"), samfast.Lora(rank=2))
    with FakeTensorMode():
        samfast.attach(toy(), samfast.Lora(rank=2))
    assert not_finite({"empty": torch.empty(0), "count": torch.ones((), dtype=torch.long)}) is None


def test_one_wait_for_all_tensors_of_a_device():
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                waits.append(func)
            return func(*args, **(kwargs or {}))

    tensors = {f"t{i}": torch.ones(5) for i in range(6)}
    with Watch():
        assert not_finite(tensors) is None
    assert not waits  # values go to the CPU in one tensor
    tensors["t4"][3] = NAN
    tensors["t5"][0] = INF
    with Watch():
        assert not_finite(tensors) == "t4"
    assert len(waits) == 1


def test_shards_are_read_where_they_are(tmp_path):
    """Without asking other processes, so that none waits for one that has refused."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fine = fully_shard(nn.Linear(4, 4), mesh=mesh)
        broken = fully_shard(spoil(nn.Linear(4, 4), "bias", NAN), mesh=mesh)
        with CommDebugMode() as asked:
            assert base_problem(fine) is None
            assert base_problem(broken) == "bias contains NaN or infinity"
        assert asked.get_total_counts() == 0
    finally:
        torch.distributed.destroy_process_group()


def test_load_adapter_names_nan_in_the_base(tiny_sam, saved):
    folder, _ = saved
    for name in ("image_encoder.pos_embed", NECK, "image_encoder.blocks.0.attn.rel_pos_h"):
        for check_base in (True, False):
            model = spoil(tiny_sam(), name, NAN)
            with pytest.raises(ValueError, match=rf"finite numbers, but the model's {name} con"):
                samfast.load_adapter(model, folder, check_base=check_base)
            assert not adapters(model)


def test_load_adapter_onto_a_model_whose_training_diverged(tiny_sam, saved):
    folder, good = saved
    diverged = samfast.attach(tiny_sam(), samfast.Lora(rank=2))
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(diverged):
            parameter.fill_(NAN)
    samfast.load_adapter(diverged, folder)
    for name, tensor in good.state_dict().items():
        assert torch.equal(tensor, diverged.state_dict()[name]), name
    spoil(diverged, NECK, NAN)
    with pytest.raises(ValueError, match=rf"but the model's {NECK} contains NaN or infinity;"):
        samfast.load_adapter(diverged, folder)


def test_load_adapter_onto_a_merged_model_that_diverged(tiny_sam, saved):
    folder, good = saved
    diverged = samfast.attach(tiny_sam(), samfast.Lora(rank=2))
    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(diverged):
            parameter.fill_(NAN)
    samfast.load_adapter(samfast.merge(diverged), folder)
    state = samfast.unmerge(diverged).state_dict()
    assert all(torch.equal(t, state[name]) for name, t in good.state_dict().items())


@pytest.mark.parametrize("value", [NAN, INF])
def test_save_adapter_refuses_by_name_and_writes_nothing(saved, tmp_path, value):
    folder, sam = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    name = next(name for name, _ in samfast.trainable_parameters(sam) if "lora_A" in name)
    spoil(sam, name, value)
    for place in (folder, tmp_path / "new"):
        with pytest.raises(ValueError, match=rf"{name} contains NaN or infinity, so nothing was"):
            samfast.save_adapter(sam, place)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_save_adapter_looks_at_what_is_trained_whole(toy, tmp_path):
    for name in ("mask_decoder.lin1.bias", "mask_decoder.norm.running_var"):
        model = spoil(samfast.attach(toy(), samfast.Lora(rank=2)), name, NAN)
        with pytest.raises(ValueError, match=rf"^{name} contains NaN or infinity, so nothing was"):
            samfast.save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
