# SPDX-License-Identifier: Apache-2.0
"""Which base an adapter belongs to, at any image size and in any wrapper, and bad numbers in it."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import samfast
from samfast.adapters.adapter import adapters
from samfast.adapters.base_digest import fingerprints, identity_of
from samfast.adapters.wrappers import unwrapped
from samfast.files import format as adapter_format
from samfast.files.peft_format import from_key
from samfast.models import build_sam, segment

# Written by samfast 0.1.0: ToySam, filled(1.0) at image size 16, with Lora(rank=2) on qkv and
# train="mask_decoder.lin1"; what is trained filled(0.5).
OLD = Path(__file__).parents[1] / "golden" / "adapter-0.1.0"
A0 = "image_encoder.blocks.0.attn.qkv.lora_A"


def fill(tensors, scale):
    with torch.no_grad():
        for i, t in enumerate(tensors):
            if t.is_floating_point():
                t.copy_(((torch.arange(t.numel()) + i) % 17 / 16 - 0.5).mul(scale).view(t.shape))


@pytest.fixture
def old_base(toy):
    def build(size=16):
        model = toy()
        model.image_encoder.img_size = size
        fill(model.state_dict().values(), 1.0)
        return model

    return build


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, AveragedModel])
def test_an_adapter_of_the_first_version_loads(old_base, wrap, no_warning, tmp_path):
    record = samfast.read_adapter_config(OLD)
    assert record["samfast"] == "0.1.0" and "base_identity" not in record
    model = samfast.load_adapter(wrap(old_base()), OLD, trainable=False)
    expected = samfast.attach(old_base(), samfast.Lora(rank=2), train="mask_decoder.lin1")
    fill([p for _, p in samfast.trainable_parameters(expected)], 0.5)
    inner = unwrapped(model)
    state = expected.state_dict()
    assert state.keys() == inner.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in inner.state_dict().items())
    again = samfast.save_adapter(model, tmp_path / "again")
    assert samfast.read_adapter_config(again)["base_digest"] == record["base_digest"]
    samfast.load_adapter(expected, OLD)  # into an attached one


def test_an_adapter_of_the_first_version_knows_another_base(old_base):
    model = old_base()
    model.image_encoder.blocks[1].mlp.lin1.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="was trained on another base: toy with digest"):
        samfast.load_adapter(model, OLD)
    model = old_base(32)
    model.image_encoder.pos_embed = nn.Parameter(torch.zeros(1, 64, 12))
    with pytest.raises(
        ValueError,
        match=r"trained at image size 16, but the model has image size 32, .*samfast 0\.1\.0 wrote "
        r"its digest, which holds at one image size only; build the model at that size",
    ):
        samfast.load_adapter(model, OLD)
    samfast.load_adapter(model, OLD, check_base=False)


def identity(model, trained=()):
    return identity_of(fingerprints(model, trained))


def test_every_form_of_a_base_has_one_identity(tiny_sam, tmp_path):
    sam = tiny_sam()
    plain = identity(sam)
    assert identity(AveragedModel(sam)) == plain
    assert identity(nn.Sequential(nn.Sequential(sam))) == plain
    sam.image_encoder = torch.compile(sam.image_encoder, backend="eager")
    assert identity(sam) == plain
    sam = samfast.fuse(tiny_sam())
    assert identity(sam) == plain
    for method in (samfast.Lora(rank=2), samfast.AdaptFormer(bottleneck=4)):
        sam = samfast.attach(tiny_sam(), method, train=())
        own = {f"{n}.{own}" for n, m in adapters(sam).items() for own, _ in m.adapter_state()}
        assert identity(samfast.fuse(sam), own) == plain
    sam = samfast.attach(tiny_sam(), samfast.Lora(rank=2), train=(), base_dtype=torch.bfloat16)
    own = {name for name, _ in samfast.trainable_parameters(sam)}
    assert identity(samfast.merge(sam), own) == plain
    sam = tiny_sam()
    for name, parameter in sam.named_parameters():
        if name.rpartition(".")[2] in ("pos_embed", "rel_pos_h", "rel_pos_w"):
            parameter.data += 1
    assert identity(sam) == plain
    sam.image_encoder.neck[0].weight.data += 1
    assert identity(sam) != plain


@pytest.fixture
def at_size(tmp_path):
    """vit_tiny of one checkpoint at any image size."""
    torch.save(build_sam("vit_tiny", image_size=64, seed=3).state_dict(), tmp_path / "c.pth")
    return lambda size: build_sam("vit_tiny", tmp_path / "c.pth", image_size=size)


def test_an_adapter_loads_at_every_image_size_of_its_base(at_size, move, tmp_path):
    sam = move(samfast.attach(at_size(96), samfast.Lora(rank=2), train="mask_decoder.iou_token"))
    folder = samfast.save_adapter(sam, tmp_path / "adapter")
    sizes = "was trained at image size 96, but the model has image size 48$"
    with pytest.warns(UserWarning, match=sizes):
        other = samfast.load_adapter(at_size(48), folder)
    state = sam.state_dict()
    for name, tensor in other.state_dict().items():
        assert tensor.shape != state[name].shape or torch.equal(tensor, state[name]), name
    images = torch.zeros(1, 3, 48, 48)
    with torch.no_grad():
        assert not torch.equal(segment(other, images), segment(at_size(48), images))
    with pytest.raises(
        ValueError, match="image size 96, but the model has image size 48, and was trained on anot"
    ):
        samfast.load_adapter(build_sam("vit_tiny", image_size=48, seed=4), folder)


def test_trained_positions_belong_to_one_image_size(at_size, tmp_path):
    sam = samfast.attach(at_size(96), samfast.Lora(rank=2), train="image_encoder.pos_embed")
    folder = samfast.save_adapter(sam, tmp_path / "adapter")
    with pytest.raises(
        ValueError,
        match=r"pos_embed of shape \(1, 6, 6, 192\), but in the model it is \(1, 3, 3, 192\); "
        "it was trained at image size 96, but the model has image size 48$",
    ):
        samfast.load_adapter(at_size(48), folder)


def rewritten(folder, name, tensor):
    """The same folder with another tensor, its digest put right."""
    path = folder / adapter_format.TENSORS
    with safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["samfast"])["record"]
    (key,) = [key for key in tensors if from_key(key) == name]
    tensors[key] = tensor(tensors[key])
    content = {"record": record, "sha256": adapter_format.digest(record, tensors)}
    path.write_bytes(safetensors.torch.save(tensors, {"samfast": json.dumps(content)}))
    return folder


def with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (with_value(float("nan")), f"cannot be used: {A0} contains NaN or infinity$"),
        (with_value(float("-inf")), f"cannot be used: {A0} contains NaN or infinity$"),
        (torch.Tensor.long, rf"has {A0} as torch\.int64, but in the model it is torch\.float32$"),
        (torch.Tensor.bool, rf"has {A0} as torch\.bool, but in the model it is torch\.float32$"),
        (lambda t: t + 0j, rf"has {A0} as torch\.complex64, but in the model it is torch\.float"),
        (
            lambda t: (
                t.to(torch.float8_e4m3fn).view(torch.uint8).fill_(0x7F).view(torch.float8_e4m3fn)
            ),
            f"{A0} contains NaN or infinity$",
        ),
    ],
    ids=["nan", "infinity", "integer", "bool", "complex", "float8 nan"],
)
def test_tensors_that_are_no_weights_are_refused_by_name(old_base, tmp_path, change, sentence):
    folder = rewritten(shutil.copytree(OLD, tmp_path / "adapter"), A0, change)
    model = old_base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        samfast.load_adapter(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nan_in_an_adapter_of_peft_is_refused(old_base, tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "adapter")
    path = folder / adapter_format.TENSORS
    tensors = safetensors.torch.load_file(path)
    config = json.loads((folder / adapter_format.CONFIG).read_text())
    config["auto_mapping"] = None
    (folder / adapter_format.CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, path)
    samfast.load_adapter(old_base(), folder)
    tensors["base_model.model.mask_decoder.lin1.bias"].fill_(float("nan"))
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"mask_decoder\.lin1\.bias contains NaN or infinity$"):
        samfast.load_adapter(old_base(), folder)
