# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in every form that is read, at other sizes, damaged, hostile or of another model."""

import copy
import json
import os
import pickle
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from budgets import all_within_budget, within_budget

from samfast.models import build_sam
from samfast.models.architectures import ARCHITECTURES
from samfast.models.build import _construct
from samfast.models.checkpoints import read_checkpoint


@pytest.fixture(scope="module")
def state(tiny):
    return tiny.state_dict()


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(state, path)
    return path


def assert_same(sam, state):
    ours = sam.state_dict()
    assert ours.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(ours[name], tensor), name


def damage(path, position, value=255):
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(bytes([value]))


# ---------------------------------------------------------------------------- files


def test_a_pth_file_gives_its_weights(checkpoint, state, tiny):
    sam = build_sam("vit_tiny", checkpoint)
    assert_same(sam, state)
    assert torch.equal(sam.pixel_mean, tiny.pixel_mean)
    assert torch.equal(sam.pixel_std, tiny.pixel_std)
    assert repr(sam) == repr(tiny)
    assert all(p.requires_grad and p.is_contiguous() and p.is_leaf for p in sam.parameters())
    assert sam.samfast_base["checkpoint"] == "tiny.pth"


def test_the_weights_do_not_hang_on_the_file(checkpoint, state, tmp_path):
    path = tmp_path / "copy.pth"
    path.write_bytes(checkpoint.read_bytes())
    sam = build_sam("vit_tiny", path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(sam, state)


def test_old_pytorch_files_are_read(state, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_same(build_sam("vit_tiny", path), state)


def test_safetensors_in_half_precision_become_float32(state, tmp_path):
    path = tmp_path / "tiny.safetensors"
    halves = {name: tensor.half() for name, tensor in state.items()}
    safetensors.torch.save_file(halves, path)
    assert_same(build_sam("vit_tiny", str(path)), {k: v.float() for k, v in halves.items()})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "sam.", "model.", "module.model.sam."])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_prefixes_and_wrappers_are_taken_off(prefix, wrapper, tmp_path):
    state = {"image_encoder.pos_embed": torch.ones(1), "mask_decoder.b": torch.zeros(1)}
    content = {prefix + name: tensor for name, tensor in state.items()}
    if wrapper:
        content = {"epoch": 3, wrapper: content, "optimizer": {"state": {}}}
    path = tmp_path / "wrapped.pth"
    torch.save(content, path)
    read = read_checkpoint(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_a_compiled_part_is_read(tmp_path):
    path = tmp_path / "compiled.pth"
    torch.save({"image_encoder._orig_mod.pos_embed": torch.ones(1)}, path)
    assert list(read_checkpoint(path)) == ["image_encoder.pos_embed"]


# ---------------------------------------------------------------------------- other sizes


def interpolate(values, target):
    """Linear interpolation of [n, ...] to [target, ...] between pixel centres, edges clamped."""
    places = (torch.arange(target, dtype=values.dtype) + 0.5) * len(values) / target - 0.5
    places = places.clamp(0, len(values) - 1)
    first = places.floor().long()
    share = (places - first).view(-1, *[1] * (values.dim() - 1))
    return (1 - share) * values[first] + share * values[(first + 1).clamp(max=len(values) - 1)]


@pytest.mark.parametrize("size", [96, 512])
def test_positions_are_interpolated_to_the_image_size(size, checkpoint, state):
    sam = build_sam("vit_tiny", checkpoint, image_size=size)
    grid = size // 16

    def resized(dtype):
        pos_embed = interpolate(state["image_encoder.pos_embed"][0].to(dtype), grid)
        pos_embed = interpolate(pos_embed.transpose(0, 1), grid).transpose(0, 1)
        made = {"image_encoder.pos_embed": pos_embed[None]}
        for block in (2, 5):
            for axis in "hw":
                name = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
                made[name] = interpolate(state[name].to(dtype), 2 * grid - 1)
        return made

    ours = sam.state_dict()
    changed = {name: tensor for name, tensor in ours.items() if tensor.shape != state[name].shape}
    assert len(changed) == 5
    stock, exact = (partial(resized, dtype) for dtype in (torch.float32, torch.float64))
    all_within_budget(changed, stock, exact, torch.float32)
    for name, tensor in ours.items():
        assert tensor.is_contiguous() and tensor.dtype == torch.float32
        assert name in changed or torch.equal(tensor, state[name]), name
    images = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        assert sam.image_encoder(images).shape == (1, 256, grid, grid)


def test_windows_keep_their_tables_even_where_the_stored_map_had_their_size(tmp_path):
    stored = build_sam("vit_tiny", image_size=112, seed=1)  # 7 x 7 tokens, as a window
    path = tmp_path / "window.pth"
    torch.save(stored.state_dict(), path)
    sam = build_sam("vit_tiny", path, image_size=64)
    table = "image_encoder.blocks.0.attn.rel_pos_h"
    assert torch.equal(sam.state_dict()[table], stored.state_dict()[table])
    assert sam.image_encoder.blocks[2].attn.rel_pos_h.shape == (7, 64)


# ---------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def hugging_face():
    """A SamModel of vit_tiny's size with weights of usual size, its norms with SAM's eps."""
    from transformers import SamConfig, SamModel

    sizes = ARCHITECTURES["vit_tiny"]
    config = SamConfig(
        vision_config={
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.depth,
            "num_attention_heads": sizes.heads,
            "global_attn_indexes": list(sizes.global_blocks),
            "window_size": sizes.window,
            "image_size": 128,
        },
        prompt_encoder_config={"image_size": 128},
        mask_decoder_config={"layer_norm_eps": 1e-5},
    )
    model = SamModel(config).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
        for module in model.modules():
            if "LayerNorm" in type(module).__name__:
                module.weight += 1
        model.shared_image_embedding.positional_embedding.normal_()
    return model


def hugging_face_outputs(model, images, boxes):
    dtype = model.dtype
    embeddings = model.get_image_embeddings(images.to(dtype))
    out = model(image_embeddings=embeddings, input_boxes=boxes.to(dtype), multimask_output=True)
    return embeddings, out.pred_masks[:, 0], out.iou_scores[:, 0]


def our_outputs(sam, images, boxes):
    """As hugging_face_outputs, by segment_anything's modules for a batch of one."""
    embeddings = sam.image_encoder(images)
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes[0], masks=None)
    masks, scores = sam.mask_decoder(
        image_embeddings=embeddings,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )
    return embeddings, masks, scores


@pytest.mark.parametrize("form", ["whole", "sharded", "bin", "file"])
def test_a_hugging_face_model_gives_equal_outputs(form, hugging_face, tmp_path):
    path = tmp_path / "sam-vit-tiny"
    shards = {"max_shard_size": "8MB"} if form == "sharded" else {}
    hugging_face.save_pretrained(path, **shards)
    if form == "sharded":
        assert len(list(path.glob("*.safetensors"))) > 1
    if form == "bin":
        torch.save(hugging_face.state_dict(), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    if form == "file":
        path = path / "model.safetensors"
    sam = build_sam("vit_tiny", path, image_size=128)
    assert sam.samfast_base["checkpoint"] == path.name
    if form != "whole":
        matrix = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        assert torch.equal(matrix, hugging_face.shared_image_embedding.positional_embedding)
        whole = hugging_face.state_dict()["vision_encoder.layers.4.attn.qkv.weight"]
        assert torch.equal(sam.image_encoder.blocks[4].attn.qkv.weight, whole)
        return

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 128, 128, generator=generator)
    boxes = torch.tensor([[[10.0, 20.0, 90.0, 100.0]]])
    theirs = partial(hugging_face_outputs, hugging_face, images, boxes)
    exact = partial(hugging_face_outputs, copy.deepcopy(hugging_face).double(), images, boxes)
    with torch.no_grad():
        ours = our_outputs(sam, images, boxes)
        all_within_budget(ours, theirs, exact, torch.float32, ("embeddings", "masks", "scores"))


def test_mask_prompts_are_mapped_too(hugging_face, tmp_path):
    hugging_face.save_pretrained(tmp_path / "sam")
    sam = build_sam("vit_tiny", tmp_path / "sam", image_size=128)
    masks = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = sam.prompt_encoder(points=None, boxes=None, masks=masks)[1]
    theirs = hugging_face.prompt_encoder.mask_embed
    wide = copy.deepcopy(theirs).double()
    within_budget(ours, partial(theirs, masks), partial(wide, masks.double()), torch.float32)


@pytest.mark.parametrize("stored", [("shared",), ("tied",), ("tied", "shared"), ("shared", "tied")])
def test_either_name_of_the_shared_positions_is_enough(stored, tmp_path):
    names = {
        "shared": "shared_image_embedding.positional_embedding",
        "tied": "prompt_encoder.shared_embedding.positional_embedding",
    }
    state = {names[key]: torch.full((2, 128), float(key == "shared")) for key in stored}
    path = tmp_path / "positions.pth"
    torch.save({**state, "vision_encoder.pos_embed": torch.zeros(1)}, path)
    matrix = read_checkpoint(path)["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    assert bool(matrix.all()) == ("shared" in stored)  # as in SamModel, the shared one rules


# ---------------------------------------------------------------------------- what does not fit


def refuse(path, sentence, name="vit_tiny", kind=ValueError, **arguments):
    with pytest.raises(kind, match=sentence) as caught:
        build_sam(name, path, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vit_b", "vit_h"])
def test_a_checkpoint_of_another_model_is_named(name, tmp_path):
    with torch.device("meta"):
        other = _construct(ARCHITECTURES["vit_l"], 1024).state_dict()
    path = tmp_path / "large.safetensors"
    few = {k: torch.empty(0) for k in other if "image_encoder.blocks." in k}
    few["image_encoder.patch_embed.proj.weight"] = torch.zeros(1024, 3, 16, 16)
    safetensors.torch.save_file(few, path)
    sizes = ARCHITECTURES[name]
    refuse(
        path,
        rf"large.safetensors is of vit_l \(width 1024, 24 blocks\), "
        rf"but the model is {name} \(width {sizes.width}, {sizes.depth} blocks\)$",
        name,
    )


def test_a_checkpoint_of_an_unknown_size_is_described(state, tmp_path):
    path = tmp_path / "odd.pth"
    torch.save({k: v for k, v in state.items() if "blocks.3." not in k}, path)
    refuse(path, r"odd.pth is of an unknown model \(width 192, 5 blocks\), but the model is vit_ti")


def test_missing_unknown_and_misshapen_tensors_are_listed(state, tmp_path):
    path = tmp_path / "odd.pth"
    odd = dict(state)
    for i in range(4):
        del odd[f"mask_decoder.output_hypernetworks_mlps.{i}.layers.1.bias"]
    odd["image_encoder.extra"] = torch.zeros(1)
    odd["image_encoder.blocks.0.attn.rel_pos_h"] = torch.zeros(27, 64)
    torch.save(odd, path)
    refuse(
        path,
        r"odd.pth does not fit vit_tiny: "
        r"it lacks mask_decoder.output_hypernetworks_mlps.0.layers.1.bias, .* and 1 more, "
        r"has image_encoder.blocks.0.attn.rel_pos_h \(27, 64\) instead of \(13, 64\), "
        r"has the unknown image_encoder.extra$",
    )


def test_files_that_are_no_sam(tmp_path):
    path = tmp_path / "head.pth"
    torch.save({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, path)
    refuse(path, "holds no SAM image encoder; its keys are fc.weight, fc.bias$")
    torch.save({}, path)
    refuse(path, "holds no SAM image encoder; its keys are none$")
    torch.save([torch.zeros(2)], path)
    refuse(path, "holds a list, not tensors by name")
    torch.save({"image_encoder.pos_embed": 3}, path)
    refuse(path, "holds 'image_encoder.pos_embed' as int, not as a tensor")
    torch.save({"image_encoder.pos_embed": torch.zeros(3, dtype=torch.int8)}, path)
    refuse(path, "holds image_encoder.pos_embed as torch.int8 .* dense floating-point numbers")
    torch.save({"image_encoder.pos_embed": torch.zeros(3, device="meta")}, path)
    refuse(path, "on meta")
    twice = ("image_encoder.b", "image_encoder._orig_mod.b")
    torch.save({name: torch.zeros(1) for name in twice}, path)
    refuse(path, "holds image_encoder.b twice, once under image_encoder._orig_mod.b$")
    nested = {}
    nested["model"] = nested
    torch.save(nested, path)
    refuse(path, "holds no SAM image encoder; its keys are model$")


def test_absent_paths(tmp_path):
    refuse(tmp_path / "no.pth", r"no.pth does not exist$", kind=FileNotFoundError)
    refuse(tmp_path, "config.json does not exist", kind=FileNotFoundError)
    fifo = tmp_path / "fifo.pth"
    os.mkfifo(fifo)
    refuse(fifo, "fifo.pth is neither a file nor a folder")


def test_damaged_pth_files(checkpoint, tmp_path):
    path = tmp_path / "damaged.pth"
    whole = checkpoint.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        refuse(path, "damaged.pth is damaged or not a PyTorch checkpoint$")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_bytes_never_end_in_another_error(tmp_path):
    """Random damage is either noticed, or hits numbers only and leaves readable tensors."""
    state = {"image_encoder.pos_embed": torch.randn(3, 3), "mask_decoder.b": torch.randn(2)}
    files = {"zip.pth": {}, "old.pth": {"_use_new_zipfile_serialization": False}}
    contents = {}
    for name, arguments in files.items():
        torch.save(state, tmp_path / name, **arguments)
        contents[name] = (tmp_path / name).read_bytes()
    contents["a.safetensors"] = safetensors.torch.save(state)
    random = np.random.default_rng(0)
    noticed = 0

    def read(name, content):
        nonlocal noticed
        (tmp_path / name).write_bytes(content)
        try:
            read_checkpoint(tmp_path / name)
        except ValueError:
            noticed += 1

    for name, whole in contents.items():
        for _ in range(150):
            content = bytearray(whole[: random.integers(1, len(whole) + 1)])
            content[random.integers(len(content))] = random.integers(256)
            read(name, content)
    for position in range(1, 99):  # a zip file's table of contents begins at its end
        content = bytearray(contents["zip.pth"])
        content[-position] = 255
        read("zip.pth", content)
    assert noticed > 300


def test_damaged_safetensors(state, tmp_path):
    path = tmp_path / "damaged.safetensors"
    safetensors.torch.save_file({"image_encoder.pos_embed": torch.zeros(100)}, path)
    size = path.stat().st_size
    for position in (0, 7, 8, 20):
        safetensors.torch.save_file({"image_encoder.pos_embed": torch.zeros(100)}, path)
        damage(path, position)
        refuse(path, "damaged.safetensors is not a complete safetensors file: ")
    safetensors.torch.save_file({"image_encoder.pos_embed": torch.zeros(100)}, path)
    os.truncate(path, size - 1)
    refuse(path, "damaged.safetensors is not a complete safetensors file: ")


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (self.target,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
def test_no_file_runs_code(how, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target, path = tmp_path / "made", tmp_path / "evil.pth"
    content = {"image_encoder.pos_embed": Payload(str(target))}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    refuse(path, "evil.pth (names 'posix.mkdir', which tensors do not need|is damaged)")
    assert not target.exists()


def test_folders_that_do_not_fit(tmp_path):
    def config(content):
        (tmp_path / "config.json").write_text(content)

    config("{")
    refuse(tmp_path, "config.json is not a readable JSON file: ")
    config("[]")
    refuse(tmp_path, "config.json holds a list, not a JSON object")
    config('{"model_type": "sam2"}')
    refuse(tmp_path, "holds a model of type 'sam2', not SAM")
    config('{"model_type": "sam"}')
    refuse(
        tmp_path,
        "has neither model.safetensors nor pytorch_model.bin",
        kind=FileNotFoundError,
    )
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": [1]}')
    refuse(tmp_path, "has no weight_map from names to files")
    for outside in ("../x.safetensors", "/x.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        refuse(tmp_path, "which is not in its own folder")
    index.write_text('{"weight_map": {"a": "x.safetensors"}}')
    refuse(tmp_path, "names the file 'x.safetensors', which does not", kind=FileNotFoundError)
    safetensors.torch.save_file({"b": torch.zeros(1)}, tmp_path / "x.safetensors")
    refuse(tmp_path, "lists a, which its files do not hold")
