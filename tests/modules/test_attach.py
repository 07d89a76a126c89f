# SPDX-License-Identifier: Apache-2.0
"""attach: which layers, what is trained, dtypes, refusals that change nothing; merge; report."""

import copy
import pickle

import pytest
import torch
from budgets import within_budget
from stock_runs import by_reference
from torch import nn
from torch.nn import functional as F

import samfast
from samfast.adapters.adapter import adapters
from samfast.adapters.attachment import attachment
from samfast.models import segment
from samfast.modules import LoraLinear, QkvLora


def fresh_state(model):
    """Everything that attach could change, to compare."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "values": {name: (id(v), v.dtype) for name, v in model.state_dict(keep_vars=True).items()},
        "data": {name: v.clone() for name, v in model.state_dict().items()},
        "attributes": set(vars(model)),
    }


def assert_unchanged(model, before):
    after = fresh_state(model)
    data = before.pop("data"), after.pop("data")
    assert before == after
    assert all(torch.equal(data[0][name], data[1][name]) for name in data[0])


@pytest.mark.parametrize(
    "target, expected",
    [
        ("qkv", ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        ("proj", ["blocks.0.attn.proj", "blocks.1.attn.proj"]),  # not the Conv2d patch_embed.proj
        ("lin1", ["blocks.0.mlp.lin1", "blocks.1.mlp.lin1"]),  # not the decoder's lin1
        (("qkv", "lin2"), [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "mlp.lin2")]),
        (r".*blocks\.1\.attn\.(qkv|proj)", ["blocks.1.attn.qkv", "blocks.1.attn.proj"]),
        ("image_encoder.blocks.0.mlp.lin1", ["blocks.0.mlp.lin1"]),
    ],
    ids=str,
)
def test_targets(toy, target, expected):
    model = samfast.attach(toy(), samfast.Lora(rank=2, target=target))
    layers = adapters(model)
    assert list(layers) == [f"image_encoder.{name}" for name in expected]
    assert all(type(layer) is LoraLinear for layer in layers.values())


def test_a_pattern_reaches_the_whole_model(toy):
    model = samfast.attach(toy(), samfast.Lora(rank=1, target=r".*\.lin1"), train=())
    assert "mask_decoder.lin1" in adapters(model)


def test_a_model_without_image_encoder_is_searched_everywhere(toy):
    encoder = samfast.attach(toy().image_encoder, samfast.Lora(rank=2, target="proj"), train=())
    assert list(adapters(encoder)) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


def test_works_in_place_with_the_same_parameters_and_outputs(toy):
    model, images = toy(), torch.randn(2, 3, 16, 16)
    before, parameters = model(images), dict(model.named_parameters())
    assert samfast.attach(model, samfast.Lora(rank=3)) is model
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert torch.equal(model(images), before)


def test_what_is_trained(toy):
    model = samfast.attach(toy(), samfast.Lora(rank=2))
    trained = dict(samfast.trainable_parameters(model))
    adapter = {f"image_encoder.blocks.{i}.attn.qkv.lora_{f}" for i in (0, 1) for f in "AB"}
    decoder = {name for name, _ in model.named_parameters() if name.startswith("mask_decoder.")}
    assert set(trained) == adapter | decoder

    train = ("image_encoder.pos_embed", "image_encoder.blocks.0.norm1", "mask_decoder.norm.bias")
    model = samfast.attach(toy(), samfast.Lora(rank=2), train=train)
    others = set(dict(samfast.trainable_parameters(model))) - adapter
    norm = "image_encoder.blocks.0.norm1."
    assert others == {
        "image_encoder.pos_embed",
        norm + "weight",
        norm + "bias",
        "mask_decoder.norm.bias",
    }
    model = samfast.attach(toy(), samfast.Lora(rank=2), train="image_encoder.blocks.1.attn.qkv")
    others = set(dict(samfast.trainable_parameters(model))) - adapter
    assert others == {f"image_encoder.blocks.1.attn.qkv.{name}" for name in ("weight", "bias")}


def test_a_prefix_ends_at_a_dot(toy):
    model = toy()
    model.image_encoder.blocks.append(nn.Linear(4, 4))
    model.image_encoder.blocks.extend(nn.Linear(2, 2) for _ in range(8))  # ..., 10
    samfast.attach(model, samfast.Lora(rank=2), train="image_encoder.blocks.1")
    others = [n for n, _ in samfast.trainable_parameters(model) if "blocks.10" in n]
    assert others == []


def test_freezing_drops_old_gradients(toy):
    model = toy()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    samfast.attach(model, samfast.Lora(rank=2))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sliced_lora(toy):
    model = samfast.attach(toy(), samfast.Lora(rank=2, slices=("v", "q")))
    layers = adapters(model)
    assert {type(layer) for layer in layers.values()} == {QkvLora}
    assert next(iter(layers.values())).slices == ("q", "v")


def test_a_layer_in_two_places_stays_one_layer(toy):
    model = toy()
    model.image_encoder.blocks[1].attn = model.image_encoder.blocks[0].attn
    samfast.attach(model, samfast.Lora(rank=2))
    first, second = (block.attn.qkv for block in model.image_encoder.blocks)
    assert first is second and type(first) is LoraLinear
    model = toy()
    model.image_encoder.blocks[1].attn.qkv = model.image_encoder.blocks[0].attn.qkv
    samfast.attach(model, samfast.Lora(rank=2))
    first, second = (block.attn.qkv for block in model.image_encoder.blocks)
    assert first is second and type(first) is LoraLinear


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank is 0; it must be a whole number of at least 1"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"alpha": -1}, "alpha is -1; it must be a finite number above 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"target": ()}, "must name at least one layer"),
        ({"target": ("qkv", 3)}, "target has 3"),
        ({"target": "qkv("}, "neither a layer's name nor a regular expression"),
        ({"slices": ("q", "x")}, "slices has 'x'"),
        ({"slices": ("q", "q")}, "names a slice twice"),
        ({"slices": "qv"}, "must name at least one"),
        ({"slices": ("q",), "target": "proj"}, "slices are parts of qkv layers"),
        ({"slices": ("q",), "alpha": 8}, "sliced LoRA is unscaled, so alpha must be None, not 8"),
    ],
    ids=str,
)
def test_bad_options_end_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        samfast.Lora(**options)


class OwnLinear(nn.Linear):
    pass


def with_own_linear(model):
    model.image_encoder.blocks[1].attn.qkv = OwnLinear(12, 36)


def with_hook(model):
    model.image_encoder.blocks[1].attn.qkv.register_forward_hook(lambda *_: None)


def with_one_adapter(model):
    attn = model.image_encoder.blocks[1].attn
    attn.proj = LoraLinear.from_linear(attn.proj, 2)


@pytest.mark.parametrize(
    "method, options, prepare, message",
    [
        ({"rank": 13}, {}, None, r"blocks.0.attn.qkv: rank 13 is above 12, .* 12 inputs and 36"),
        ({"rank": 13, "slices": ("q",)}, {}, None, "rank 13 is above 12, .* a qkv slice"),
        ({"target": "query"}, {}, None, "'query' matches no layer in image_encoder; .*attn.qkv, "),
        ({"target": ("qkv", "x.*")}, {}, None, r"'x\.\*' matches no layer; linear layers there"),
        ({}, {"train": ("decoder",)}, None, "train names 'decoder', .* parts are image_encoder, "),
        ({}, {"train": ("mask_decoder", "")}, None, "train has ''"),
        ({}, {"base_dtype": torch.int8}, None, "base_dtype is torch.int8; it must be one of"),
        ({}, {}, with_own_linear, "blocks.1.attn.qkv is a OwnLinear, whose forward lora would"),
        ({}, {}, with_hook, "blocks.1.attn.qkv has hooks, which would be lost"),
        ({}, {}, with_one_adapter, "blocks.1.attn.proj already has an adapter, LoraLinear"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_refusal_changes_nothing(toy, method, options, prepare, message):
    model = toy()
    if prepare is not None:
        prepare(model)
    before = fresh_state(model)
    with pytest.raises(ValueError, match=message):
        samfast.attach(model, samfast.Lora(**method), **options)
    assert_unchanged(model, before)


def test_a_rank_that_only_a_later_layer_refuses_changes_nothing(toy):
    model = toy()
    model.image_encoder.blocks[1].attn.qkv = nn.Linear(12, 3)
    before = fresh_state(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv: rank 4 is above 3"):
        samfast.attach(model, samfast.Lora(rank=4), base_dtype=torch.bfloat16)
    assert_unchanged(model, before)


def test_attaching_twice_is_refused(toy):
    model = samfast.attach(toy(), samfast.Lora(rank=2))
    before = fresh_state(model)
    for method in (samfast.Lora(rank=2), samfast.Lora(rank=2, target="proj")):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv already has an adapter"):
            samfast.attach(model, method)
    assert_unchanged(model, before)


def test_decoder_only(toy):
    model = samfast.attach(toy(), samfast.DecoderOnly(), base_dtype=torch.bfloat16)
    trained = dict(samfast.trainable_parameters(model))
    assert trained and all(name.startswith("mask_decoder.") for name in trained)
    assert adapters(model) == {} and model.image_encoder.pos_embed.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"DecoderOnly\(.* is already attached to the model"):
        samfast.attach(model, samfast.Lora())


def test_wrong_kinds_of_argument(toy):
    with pytest.raises(TypeError, match="method is 'lora', which is not one of samfast's methods"):
        samfast.attach(toy(), "lora")
    with pytest.raises(TypeError, match="model is dict, not a torch"):
        samfast.attach({}, samfast.Lora())
    with pytest.raises(ValueError, match="matches no layer, which has no linear layer at all"):
        samfast.attach(nn.Sequential(nn.Conv2d(1, 1, 1)), samfast.Lora(), train=())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_base_dtype_casts_the_frozen_encoder_alone(tiny_sam, dtype):
    sam = tiny_sam()
    train = ("mask_decoder", "image_encoder.neck")
    samfast.attach(sam, samfast.Lora(rank=2), train=train, base_dtype=dtype)
    for name, parameter in sam.named_parameters():
        frozen_encoder = name.startswith("image_encoder.") and not parameter.requires_grad
        assert parameter.dtype == (dtype if frozen_encoder else torch.float32), name
    assert sam.image_encoder.blocks[0].attn.qkv.lora_A.requires_grad
    assert all(buffer.dtype == torch.float32 for buffer in sam.buffers())


def test_base_dtype_of_a_double_model_makes_float_adapters(toy):
    model = samfast.attach(toy().double(), samfast.Lora(rank=2), base_dtype=torch.bfloat16)
    layer = model.image_encoder.blocks[0].attn.qkv
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
    assert model.image_encoder.scale.dtype == torch.bfloat16
    assert model.mask_decoder.lin1.weight.dtype == torch.float64
    double = samfast.attach(toy().double(), samfast.Lora(rank=2))
    assert double.image_encoder.blocks[0].attn.qkv.lora_A.dtype == torch.float64


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_bfloat16_base_trains_end_to_end(tiny_sam, autocast, move):
    sam = samfast.attach(tiny_sam(), samfast.Lora(rank=2), base_dtype=torch.bfloat16)
    move(sam)
    images = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = segment(sam, images)
    assert logits.shape == (2, 1, 64, 48) and logits.isfinite().all()
    logits.float().square().mean().backward()
    for name, parameter in samfast.trainable_parameters(sam):
        if ".lora_" in name or "mask_decoder.transformer" in name:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.any(), name


def test_a_trained_norm_in_a_bfloat16_encoder_needs_autocast(tiny_sam):
    train = ("image_encoder.blocks.0.norm1", "image_encoder.neck")
    sam = samfast.attach(tiny_sam(), samfast.Lora(), train=train, base_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        segment(sam, torch.zeros(1, 3, 64, 64)).float().sum().backward()
    assert sam.image_encoder.neck[0].weight.grad.dtype == torch.float32


def test_copies_of_an_attached_model(toy, move):
    model = move(samfast.attach(toy(), samfast.Lora(rank=2)))
    images = torch.randn(2, 3, 16, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images))
        assert attachment(twin) == attachment(model) and attachment(twin) is not attachment(model)
        twin.image_encoder.blocks[0].attn.qkv.lora_A.data.zero_()
        assert model.image_encoder.blocks[0].attn.qkv.lora_A.any()


def test_state_dict_round_trip(toy, move):
    model = move(samfast.attach(toy(), samfast.Lora(rank=2)))
    other = samfast.attach(toy(seed=5), samfast.Lora(rank=2))
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(other(images), model(images))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("slices", [None, ("q", "v")], ids=["lora", "sliced"])
def test_merge_and_unmerge(toy, move, slices):
    model = move(samfast.attach(toy(), samfast.Lora(rank=2, slices=slices)))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    images = torch.randn(2, 3, 16, 16)
    unmerged = model(images)
    before, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    stock, exact = (
        by_reference(before.image_encoder, images),
        by_reference(wide.image_encoder, images.double()),
    )
    assert samfast.merge(model) is model
    assert not torch.equal(model(images), unmerged)
    within_budget(model.image_encoder(images), stock, exact, torch.float32)
    assert samfast.report(model).merged == 2
    assert samfast.unmerge(model) is model
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(model(images), unmerged)
    samfast.unmerge(model)


def test_merge_without_adapter(toy):
    for function in (samfast.merge, samfast.unmerge, samfast.merged_state_dict):
        with pytest.raises(ValueError, match="this ToySam has no adapter"):
            function(toy())


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_merged_state_dict_loads_into_the_stock_model(toy, move, merged):
    model = move(samfast.attach(toy(), samfast.Lora(rank=2)))
    if merged:
        samfast.merge(model)
    state = samfast.merged_state_dict(model)
    assert samfast.report(model).merged == 2 * merged
    stock = toy(seed=4)
    stock.load_state_dict(state)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(stock(images), samfast.merge(model)(images))


def test_parameter_groups(toy):
    model = samfast.attach(toy(), samfast.Lora(rank=2))
    decayed, plain = samfast.parameter_groups(model, 1e-3, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {
        "lora_A",
        "lora_B",
        "weight",
    }
    assert {names[id(p)] for p in plain["params"]} == {
        "mask_decoder.norm.weight",
        "mask_decoder.norm.bias",
        "mask_decoder.lin1.bias",
    }
    assert (decayed["lr"], decayed["weight_decay"]) == (1e-3, 0.1)
    assert (plain["lr"], plain["weight_decay"]) == (1e-3, 0.0)
    total = len(list(samfast.trainable_parameters(model)))
    assert len(decayed["params"]) + len(plain["params"]) == total
    only = samfast.parameter_groups(samfast.attach(toy(), samfast.Lora(), train=()), 1e-3)
    assert len(only) == 1
    torch.optim.AdamW(samfast.parameter_groups(model, 1e-3, 0.1))


def test_report(toy):
    model = samfast.attach(toy(), samfast.Lora(rank=2), base_dtype=torch.bfloat16)
    found = samfast.report(model)
    assert found.method == samfast.Lora(rank=2)
    assert found.layers == {f"image_encoder.blocks.{i}.attn.qkv": "LoraLinear" for i in (0, 1)}
    assert found.adapter_parameters == 2 * 2 * (12 + 36)
    assert found.other_trained_parameters == 2 * 16 + 13
    assert found.trained_tensors == 4 + 4
    assert found.trained_by_part == {"image_encoder": 192, "mask_decoder": 45}
    assert found.trained_parameters == 237
    assert found.frozen_parameters == sum(p.numel() for p in toy().image_encoder.parameters())
    assert found.trained_dtypes == {torch.float32: 237}
    assert found.frozen_dtypes == {torch.bfloat16: found.frozen_parameters}
    assert list(found.backends) == ["lora_linear"] and len(found.backends["lora_linear"]) == 1
    text = str(found)
    for part in ("Lora(rank=2", "2 x LoraLinear", "237 in 8 tensors", "bfloat16", "lora_linear"):
        assert part in text
    plain = samfast.report(toy())
    assert plain.method is None and plain.layers == {} and "none" in str(plain)


def test_compiled_and_parallel_wrappers_are_looked_through(toy):
    model = samfast.attach(toy(), samfast.Lora(rank=2))
    wrapped = torch.compile(model, backend="eager")
    assert samfast.report(wrapped).layers == samfast.report(model).layers
    samfast.merge(nn.DataParallel(wrapped))
    assert samfast.report(model).merged == 2


def test_vit_tiny_counts(tiny_sam):
    sam = samfast.attach(tiny_sam(), samfast.Lora(rank=4))
    found = samfast.report(sam)
    assert len(found.layers) == 6 and found.adapter_parameters == 6 * 4 * (192 + 576)
    assert found.other_trained_parameters == sum(p.numel() for p in sam.mask_decoder.parameters())


def test_every_trained_tensor_moves_within_three_steps(toy):
    """B starts at zero and blocks A's gradient in the first step only."""
    model = samfast.attach(toy(), samfast.Lora(rank=2, target=("qkv", "proj", "lin1", "lin2")))
    model.train()
    start = {n: p.detach().clone() for n, p in samfast.trainable_parameters(model)}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in start}
    optimizer = torch.optim.AdamW(samfast.parameter_groups(model, 1e-2))
    images, target = torch.randn(4, 3, 16, 16), torch.randn(4, 16)
    for _ in range(3):
        loss = F.mse_loss(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    now = dict(model.named_parameters())
    assert [name for name in start if torch.equal(start[name], now[name])] == []
    assert all(torch.equal(frozen[name], now[name]) for name in frozen)
