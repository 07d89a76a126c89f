# SPDX-License-Identifier: Apache-2.0
"""Adapter folders: round trips, the base's digest, killed writes, damage, refusals."""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import samfast
from samfast.adapters.adapter import adapters
from samfast.adapters.attachment import attachment
from samfast.adapters.base_digest import SAMPLE, base_digest, fingerprint
from samfast.files import format as adapter_format
from samfast.files.peft_format import from_key
from samfast.models import build_sam, segment

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
METHODS = pytest.mark.parametrize(
    "method",
    [
        samfast.Lora(rank=2, alpha=4, dropout=0.1),
        samfast.Lora(rank=2, slices=("q", "v")),
        samfast.DecoderOnly(),
    ],
    ids=["lora", "sliced", "decoder"],
)


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(8))


@pytest.fixture
def saved(toy, move, tmp_path):
    """(attached model with moved adapters, its folder)"""
    model = move(samfast.attach(toy(), samfast.Lora(rank=2)))
    return model, samfast.save_adapter(model, tmp_path / "adapter")


def state_of(model):
    return {
        "modules": {n: id(m) for n, m in model.named_modules()},
        "grads": {n: p.requires_grad for n, p in model.named_parameters()},
        "data": {n: (v.dtype, v.shape, v.numpy().tobytes()) for n, v in model.state_dict().items()},
        "attributes": {k: repr(v) for k, v in vars(model).items() if not k.startswith("_")},
    }


@METHODS
@pytest.mark.parametrize("trainable", [False, True])
def test_round_trip_on_a_stock_model(toy, move, images, tmp_path, method, trainable):
    model = move(samfast.attach(toy(), method))
    folder = samfast.save_adapter(model, tmp_path / "deep" / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]
    stock = toy()
    assert samfast.load_adapter(stock, str(folder), trainable=trainable) is stock
    assert torch.equal(stock(images), model(images))
    assert attachment(stock) == attachment(model)
    trained = dict(samfast.trainable_parameters(stock))
    assert set(trained) == (set(dict(samfast.trainable_parameters(model))) if trainable else set())


@METHODS
def test_saving_what_was_loaded_gives_the_same_bytes(toy, move, tmp_path, method):
    model = move(samfast.attach(toy(), method))
    first = samfast.save_adapter(model, tmp_path / "a", classes=2)
    stock = samfast.load_adapter(toy(), first)
    second = samfast.save_adapter(stock, tmp_path / "b", classes=2)
    for name in (CONFIG, TENSORS):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_loads_into_an_attached_model(toy, saved, images):
    model, folder = saved
    other = samfast.attach(toy(), samfast.Lora(rank=2))
    layers = {name: id(layer) for name, layer in adapters(other).items()}
    samfast.load_adapter(other, folder, trainable=True)
    assert {name: id(layer) for name, layer in adapters(other).items()} == layers
    assert torch.equal(other(images), model(images))
    merged = samfast.merge(samfast.attach(toy(), samfast.Lora(rank=2, alpha=2)))
    samfast.load_adapter(merged, folder)
    assert samfast.report(merged).merged == 2
    assert torch.equal(samfast.unmerge(merged)(images), model(images))


def test_merged_and_unmerged_save_the_same(toy, saved, tmp_path):
    model, folder = saved
    other = samfast.save_adapter(samfast.merge(model), tmp_path / "merged")
    assert (other / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()


def test_what_is_saved(toy, saved):
    model, folder = saved
    tensors = safetensors.torch.load_file(folder / TENSORS)
    names = {from_key(key) for key in tensors}
    trained = set(dict(samfast.trainable_parameters(model)))
    statistics = {f"mask_decoder.norm.{n}" for n in ("running_mean", "running_var")}
    assert names == trained | statistics | {"mask_decoder.norm.num_batches_tracked"}


def test_batch_statistics_of_trained_modules_come_back(toy, images, tmp_path):
    model = samfast.attach(toy(), samfast.Lora(rank=2)).train()
    for _ in range(3):
        model(images)
    folder = samfast.save_adapter(model.eval(), tmp_path / "adapter")
    stock = samfast.load_adapter(toy(), folder)
    assert torch.equal(stock(images), model(images))
    assert stock.mask_decoder.norm.num_batches_tracked == 3


def test_trained_weights_inside_the_encoder(toy, move, images, tmp_path):
    train = ("image_encoder.blocks.0.attn.qkv", "image_encoder.pos_embed", "mask_decoder.lin1")
    model = move(samfast.attach(toy(), samfast.Lora(rank=2), train=train))
    folder = samfast.save_adapter(model, tmp_path / "adapter")
    samfast.merge(model)
    assert samfast.load_adapter(toy(), samfast.save_adapter(model, tmp_path / "merged"))(
        images
    ).equal(samfast.unmerge(model)(images))
    stock = samfast.load_adapter(toy(), folder, base_dtype=torch.bfloat16)
    assert stock.image_encoder.blocks[0].attn.qkv.weight.dtype == torch.float32
    assert stock.image_encoder.blocks[1].attn.qkv.weight.dtype == torch.bfloat16
    assert torch.equal(stock.image_encoder.pos_embed, model.image_encoder.pos_embed)


def test_shared_tensors_are_saved_once(toy, move, images, tmp_path):
    def shared():
        model = toy()
        blocks = model.image_encoder.blocks
        blocks[1].attn.qkv = blocks[0].attn.qkv
        blocks[1].norm1.weight = blocks[0].norm1.weight
        return model

    train = ("mask_decoder", "image_encoder.blocks.1.norm1")
    model = move(samfast.attach(shared(), samfast.Lora(rank=2), train=train))
    folder = samfast.save_adapter(model, tmp_path / "adapter")
    names = [from_key(k) for k in safetensors.torch.load_file(folder / TENSORS)]
    assert sum("lora_A" in name for name in names) == 1
    assert sum("norm1.weight" in name for name in names) == 1
    stock = samfast.load_adapter(shared(), folder)
    assert torch.equal(stock(images), model(images))
    assert stock.image_encoder.blocks[0].attn.qkv is stock.image_encoder.blocks[1].attn.qkv


def test_the_configuration(toy, saved, tmp_path):
    model, folder = saved
    model.samfast_base = {"name": "toy", "seed": 0}
    model.image_encoder.img_size = 16
    samfast.save_adapter(model, folder, classes=["a", "b"], lr=0.1)
    record = samfast.read_adapter_config(folder)
    assert record["method"] == {
        "name": "lora",
        "rank": 2,
        "alpha": None,
        "dropout": 0.0,
        "target": "qkv",
        "slices": None,
    }
    assert record["layers"] == [f"image_encoder.blocks.{i}.attn.qkv" for i in (0, 1)]
    assert record["base"] == {"name": "toy", "seed": 0}
    assert len(record["base_digest"]) == 64 and record["base_dtype"] is None
    assert record["head"] == "sam" and record["classes"] == ["a", "b"]
    assert record["image_size"] == 16 and record["extra"] == {"lr": 0.1}
    assert record["samfast"] == samfast.__version__
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["auto_mapping"]["samfast"] == record
    sliced = samfast.attach(toy(), samfast.Lora(rank=2, slices=("k",)))
    other = samfast.save_adapter(sliced, tmp_path / "sliced", head="parts", image_size=32)
    config = json.loads((other / CONFIG).read_text())
    assert config == samfast.read_adapter_config(other) and "peft_type" not in config
    assert config["method"]["slices"] == ["k"] and config["image_size"] == 32
    assert config["head"] == "parts" and config["base"] == {"name": None}


def test_vit_tiny_round_trip(tiny_sam, move, tmp_path):
    sam = move(samfast.attach(tiny_sam(), samfast.Lora(rank=3)), std=0.02)
    folder = samfast.save_adapter(sam, tmp_path / "adapter")
    record = samfast.read_adapter_config(folder)
    assert record["image_size"] == 64 and record["base"]["name"] == "vit_tiny"
    images = torch.randint(0, 256, (2, 3, 64, 50), dtype=torch.uint8)
    with torch.no_grad():
        expected = segment(sam, images)
        plain = segment(tiny_sam(), images)
        loaded = segment(samfast.load_adapter(tiny_sam(), folder), images)
    assert torch.equal(loaded, expected) and not torch.equal(plain, expected)
    with pytest.raises(ValueError, match="was trained on another base: vit_tiny with digest"):
        samfast.load_adapter(build_sam("vit_tiny", image_size=64, seed=1), folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_of_a_cast_base_fits_the_original_and_back(toy, move, tmp_path, dtype):
    cast = move(samfast.attach(toy(), samfast.Lora(rank=2), base_dtype=dtype))
    plain = move(samfast.attach(toy(), samfast.Lora(rank=2)))
    of_cast = samfast.save_adapter(cast, tmp_path / "cast")
    of_plain = samfast.save_adapter(plain, tmp_path / "plain")
    assert samfast.read_adapter_config(of_cast)["base_dtype"] == str(dtype)[6:]
    digests = {samfast.read_adapter_config(f)["base_digest"] for f in (of_cast, of_plain)}
    assert len(digests) == 1
    samfast.load_adapter(toy(), of_cast)
    samfast.load_adapter(cast, of_plain)
    loaded = samfast.load_adapter(toy(), of_cast, base_dtype=dtype)
    assert loaded.image_encoder.pos_embed.dtype == dtype
    with pytest.raises(ValueError, match="base_dtype is float32, but the model was attached with"):
        samfast.load_adapter(cast, of_plain, base_dtype=torch.float32)


def test_digest_sees_names_shapes_and_values(toy):
    model = toy()
    trained = {n for n in model.state_dict() if n.startswith("mask_decoder.")}
    digest = base_digest(model, trained)
    assert digest == base_digest(toy(), trained)
    attached = samfast.attach(toy(), samfast.Lora(rank=2))
    own = {n for n in attached.state_dict() if "lora_" in n}
    assert base_digest(attached, trained | own) == digest
    assert base_digest(samfast.merge(attached), trained | own) == digest
    model.mask_decoder.lin1.weight.data.add_(1)
    assert base_digest(model, trained) == digest
    assert base_digest(model, trained - {"mask_decoder.lin1.weight"}) != digest
    model.image_encoder.scale.add_(1)  # a buffer
    assert base_digest(model, trained) != digest
    model.image_encoder.scale.sub_(1)
    assert base_digest(model, trained) == digest
    model.image_encoder.blocks[1].mlp.lin2.bias.data[3] += 1
    assert base_digest(model, trained) != digest


def test_fingerprint_samples_spread_over_the_tensor():
    big = torch.zeros(5 * SAMPLE + 3)
    plain = fingerprint(big)
    seen = sum(
        fingerprint(torch.nn.functional.one_hot(torch.tensor(i), len(big))) != plain
        for i in range(0, len(big), 97)
    )
    assert 0 < seen <= SAMPLE
    big[6 * 850] = 1  # the step is 6
    assert fingerprint(big) != plain
    big[6 * 850] = 0
    assert fingerprint(big.view(1, -1)) != plain
    last = torch.zeros(SAMPLE)
    last[-1] = 1
    assert fingerprint(last) != fingerprint(torch.zeros(SAMPLE))
    assert fingerprint(torch.zeros(4, 6).t()) == fingerprint(torch.zeros(6, 4))
    assert fingerprint(torch.zeros(0)) == fingerprint(torch.zeros(0))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(4))
def test_a_kill_during_saving_leaves_the_old_adapter_or_the_new(
    toy, saved, images, step, monkeypatch
):
    """Killed at the n-th of: first file synced, second file synced, first rename, second rename."""
    model, folder = saved
    old = model(images).detach()
    calls = []

    def dying(function):
        def call(*args):
            if len(calls) == step:
                raise Killed
            calls.append(args)
            return function(*args)

        return call

    with torch.no_grad():
        for _, parameter in samfast.trainable_parameters(model):
            parameter.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed program cleans nothing
        with pytest.raises(Killed):
            samfast.save_adapter(model, folder)
    assert torch.equal(samfast.load_adapter(toy(), folder)(images), old)
    assert len(list(folder.iterdir())) > 2
    monkeypatch.setattr(os, "getpid", lambda: 1)  # another program
    samfast.save_adapter(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]
    assert torch.equal(samfast.load_adapter(toy(), folder)(images), model(images))


@pytest.mark.parametrize("step", range(5))
def test_a_kill_during_the_first_save_leaves_no_folder(toy, saved, tmp_path, step, monkeypatch):
    """Killed at the n-th of: two files synced, the folder synced and renamed, its parent synced."""
    model, _ = saved
    calls = []

    def dying(function):
        def call(*args):
            if len(calls) == step:
                raise Killed
            calls.append(args)
            return function(*args)

        return call

    folder = tmp_path / "new" / "adapter"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(os, "rename", dying(os.rename))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            samfast.save_adapter(model, folder)
    assert folder.exists() == (step == 4)
    samfast.save_adapter(model, folder)
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]
    samfast.load_adapter(toy(), folder)


def test_every_flipped_bit_is_noticed(toy, saved):
    _, folder = saved
    path = folder / TENSORS
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    step = max(1, len(data) // 150)
    for position in [*range(0, header, 29), *range(header, len(data), step), len(data) - 1]:
        broken = bytearray(data)
        broken[position] ^= 4
        path.write_bytes(broken)
        stock = toy()
        before = state_of(stock)
        with pytest.raises(ValueError, match=TENSORS):
            samfast.load_adapter(stock, folder)
        assert state_of(stock) == before
    path.write_bytes(data)
    samfast.load_adapter(toy(), folder)


def truncated(folder):
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:-10])


def rewrite(folder, **changes):
    """The same folder with another record, its digest put right."""
    with safetensors.safe_open(folder / TENSORS, "pt") as file:
        content = json.loads(file.metadata()["samfast"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    record = {**content["record"], **changes.get("record", {})}
    for name in changes.get("drop", ()):
        del tensors[name]
    tensors.update(changes.get("add", {}))
    content = {"record": record, "sha256": adapter_format.digest(record, tensors)}
    data = safetensors.torch.save(tensors, metadata={"samfast": json.dumps(content)})
    (folder / TENSORS).write_bytes(data)


A0 = "base_model.model.image_encoder.blocks.0.attn.qkv.lora_A.weight"
LORA = samfast.Lora(rank=2).config()


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (shutil.rmtree, FileNotFoundError, "adapter folder .*adapter does not exist"),
        (lambda f: (shutil.rmtree(f), f.touch()), ValueError, "is a file, not an adapter folder"),
        (lambda f: (f / TENSORS).unlink(), FileNotFoundError, f"adapter has no {TENSORS}$"),
        (
            lambda f: (f / TENSORS).rename(f / "adapter_model.bin"),
            FileNotFoundError,
            "adapter_model.bin is a pickle, which samfast cannot read",
        ),
        (lambda f: (f / CONFIG).unlink(), FileNotFoundError, f"adapter has no {CONFIG}"),
        (
            lambda f: ((f / CONFIG).unlink(), os.mkfifo(f / CONFIG)),
            ValueError,
            "is not a regular file",
        ),
        (lambda f: (f / CONFIG).write_text("{"), ValueError, f"{CONFIG} is not JSON"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff"), ValueError, f"{CONFIG} is not JSON"),
        (lambda f: (f / CONFIG).write_text("[" * 99999), ValueError, f"{CONFIG} is not JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), ValueError, "holds list, not an object"),
        (truncated, ValueError, f"{TENSORS} is not a complete safetensors file"),
        (lambda f: (f / TENSORS).write_bytes(b""), ValueError, "not a complete safetensors file"),
        (lambda f: (f / TENSORS).write_bytes(b"\x80" * 99), ValueError, "not a complete"),
        (lambda f: rewrite(f, record={"format": 2}), ValueError, "format is 2, .* reads 1"),
        (lambda f: rewrite(f, record={"layers": 5}), ValueError, "layers 5, not a list"),
        (lambda f: rewrite(f, record={"layers": [5]}), ValueError, "not a list of different names"),
        (lambda f: rewrite(f, record={"base": []}), ValueError, r"base \[\], not an object"),
        (lambda f: rewrite(f, record={"method": "lora"}), ValueError, "not describe a method"),
        (
            lambda f: rewrite(f, record={"method": {"name": "dora"}}),
            ValueError,
            "unknown method 'dora'; known are lora, conv-lora, cobot-lora",
        ),
        (
            lambda f: rewrite(f, record={"method": {"name": "lora", "depth": 1}}),
            ValueError,
            "method 'lora' has no option 'depth'",
        ),
        (
            lambda f: rewrite(f, record={"method": {**LORA, "rank": "2"}}),
            ValueError,
            "rank is '2'",
        ),
        (
            lambda f: rewrite(f, drop=[A0]),
            ValueError,
            "has no tensor image_encoder.blocks.0.attn.qkv.lora_A",
        ),
        (
            lambda f: rewrite(f, add={"base_model.model.other.weight": torch.zeros(1)}),
            ValueError,
            "has a tensor other.weight, which the model does not have",
        ),
        (
            lambda f: rewrite(f, record={"base_identity": "0" * 64}),
            ValueError,
            "was trained on another base: unnamed with digest 000000000000, while this model is",
        ),
    ],
)
@pytest.mark.parametrize("attached", [False, True], ids=["stock", "attached"])
def test_a_bad_folder_ends_in_a_sentence_and_changes_nothing(
    toy, saved, damage, error, message, attached
):
    _, folder = saved
    damage(folder)
    model = samfast.attach(toy(), samfast.Lora(rank=2)) if attached else toy()
    before = state_of(model)
    with pytest.raises(error, match=message) as caught:
        samfast.load_adapter(model, folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert state_of(model) == before


QKV0 = "image_encoder.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    "record, on_stock, on_attached",
    [
        (
            {"method": {**LORA, "rank": 3}},
            r"qkv.lora_A of shape \(2, 12\), but in the model it is \(3, 12\)",
            r"is Lora\(rank=3.* but the model has Lora\(rank=2",
        ),
        (
            {"method": {**LORA, "alpha": 8}},
            None,
            r"is Lora\(rank=2, alpha=8.* but the model has Lora\(rank=2, alpha=None",
        ),
        (
            {"layers": ["image_encoder.blocks.7.attn.qkv"]},
            "belongs on a Linear image_encoder.blocks.7.attn.qkv, but the model has nothing",
            f"the model adapts {QKV0}, but adapter .* does not",
        ),
        (
            {"layers": ["image_encoder.patch_embed.proj"]},
            "belongs on a Linear image_encoder.patch_embed.proj, but the model has a Conv2d",
            f"the model adapts {QKV0}, but adapter .* does not",
        ),
        (
            {"layers": [QKV0]},
            "has a tensor image_encoder.blocks.1.attn.qkv.lora_A, which the model does not have",
            "the model adapts image_encoder.blocks.1.attn.qkv, but adapter .* does not",
        ),
        (
            {"layers": [QKV0, "image_encoder.blocks.1.attn.qkv", "mask_decoder.lin1"]},
            "mask_decoder.lin1: rank 2 is above 1",
            "adapter .* adapts mask_decoder.lin1, but the model does not",
        ),
    ],
)
@pytest.mark.parametrize("attached", [False, True], ids=["stock", "attached"])
def test_an_adapter_of_another_form_is_refused(toy, saved, record, on_stock, on_attached, attached):
    _, folder = saved
    rewrite(folder, record=record)
    model = samfast.attach(toy(), samfast.Lora(rank=2)) if attached else toy()
    message = on_attached if attached else on_stock
    if message is None:
        samfast.load_adapter(model, folder)
        return
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        samfast.load_adapter(model, folder)
    assert state_of(model) == before


def test_check_base_can_be_switched_off(toy, saved, images):
    model, folder = saved
    other = toy(seed=7)
    with pytest.raises(ValueError, match=r"check_base=False to load it anyway"):
        samfast.load_adapter(other, folder)
    samfast.load_adapter(other, folder, check_base=False)
    assert torch.equal(
        other.image_encoder.blocks[0].attn.qkv.lora_A, model.image_encoder.blocks[0].attn.qkv.lora_A
    )


def test_another_width_names_the_shapes(toy, saved):
    _, folder = saved
    with pytest.raises(
        ValueError, match=r"lora_A of shape \(2, 12\), but in the model .*\(2, 24\)"
    ):
        samfast.load_adapter(toy(width=24), folder)


def test_saving_refuses_what_it_cannot_keep(toy, saved, tmp_path):
    model, folder = saved
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="this ToySam has no adapter; samfast"):
        samfast.save_adapter(toy(), folder)
    for value in (torch.zeros(1), float("nan"), {1, 2}):
        with pytest.raises(ValueError, match="configuration must be JSON values"):
            samfast.save_adapter(model, folder, note=value)
    with pytest.raises(ValueError, match="is a file, not a folder for an adapter"):
        samfast.save_adapter(model, folder / CONFIG)
    after = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    assert before == after


def test_tensors_of_a_flat_buffer_and_odd_strides_are_saved(toy, images, tmp_path):
    model = samfast.attach(toy(), samfast.Lora(rank=2))
    flat = torch.randn(2 * (12 + 36))
    layer = model.image_encoder.blocks[0].attn.qkv
    layer.lora_A.data = flat[:24].view(12, 2).t()
    layer.lora_B.data = flat[24:].view(36, 2)
    folder = samfast.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(samfast.load_adapter(toy(), folder)(images), model(images))


def test_wrapped_models_save_plain_names(toy, saved, tmp_path):
    model, folder = saved
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    other = samfast.save_adapter(wrapped, tmp_path / "wrapped")
    assert (other / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
    samfast.load_adapter(nn.DataParallel(toy()), other)


def test_copies_of_a_loaded_model_are_loaded_models(toy, saved, images, tmp_path):
    model, folder = saved
    twin = copy.deepcopy(samfast.load_adapter(toy(), folder))
    again = samfast.save_adapter(twin, tmp_path / "again")
    assert (again / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
    assert torch.equal(twin(images), model(images))
