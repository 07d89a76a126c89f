# SPDX-License-Identifier: Apache-2.0
"""``samfast merge`` writes plain SAMs, and ``load_adapted`` models that other tools take."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

import samfast
from samfast import cli
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models import MultiTaskSam, Task, binary_head, build_sam, head_of, segment
from samfast.models.hf_names import to_hugging_face, to_segment_anything
from samfast.training.images import read_image
from tests import sam3_models
from tests.budgets import within_budget

SIZE = 64
TASKS = (Task("kinds", "semantic", 3), Task("cells", "binary"), Task("depth", "regression"))
MERGED = {
    "lora": samfast.Lora(target=("qkv", "proj", "lin1", "lin2")),
    "cobot-lora": samfast.CobotLora(),
    "kronecker": samfast.Kronecker(),
    "decoder": samfast.DecoderOnly(),
}


@pytest.fixture(scope="module")
def base():
    return build_sam("vit_tiny", image_size=SIZE, seed=3)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def moved(model, seed=5):
    """Every trained tensor some way from where it began."""
    generator = generator_of(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def adapter(base, method, folder, tasks=(), head=None, train=None):
    model = copy.deepcopy(base)
    model = head(model) if head else model
    model = MultiTaskSam(model, tasks) if tasks else model
    train = model.trained_parts() if tasks else train
    return samfast.save_adapter(moved(samfast.attach(model, method, train=train)), folder)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(2).integers(0, 255, (40, SIZE, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def merge(adapter, output, *more):
    return cli.main(["merge", "--adapter", str(adapter), "--output", str(output), *more])


def plain_sam(path, size=SIZE):
    """segment_anything's Sam with a file's tensors: all of them, and no others."""
    sam = build_sam("vit_tiny", image_size=size, seed=0)
    sam.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert type(sam).__module__.startswith("segment_anything")
    return sam.eval()


def padded(pixels):
    """(1, 3, SIZE, SIZE), as SamPredictor pads: with what becomes zero."""
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    images = mean.repeat(1, 1, SIZE, SIZE)
    images[0, :, : len(pixels)] = torch.from_numpy(pixels).permute(2, 0, 1)
    return images


def predicted(sam, pixels):
    """Mask and logits as SamPredictor gives them."""
    predictor = SamPredictor(sam)
    predictor.set_image(pixels)
    mask, _, _ = predictor.predict(multimask_output=False)
    logits, _, _ = predictor.predict(multimask_output=False, return_logits=True)
    return mask[0], logits[0]


@pytest.mark.slow_on_cpu(but=["lora"])
@pytest.mark.parametrize("name", MERGED)
def test_a_plain_sam_predicts_what_samfast_predicts(name, base, photo, tmp_path, capsys):
    folder = adapter(base, MERGED[name], tmp_path / "adapter")
    assert merge(folder, tmp_path / "new" / "merged.pth") == 0
    assert 'build_sam("vit_tiny", checkpoint=' in capsys.readouterr().out
    assert (
        cli.main(["predict", "--adapter", str(folder), "--output", str(tmp_path), str(photo)]) == 0
    )

    pixels = read_image(photo)
    sam = plain_sam(tmp_path / "new" / "merged.pth")
    mask, logits = predicted(sam, pixels)
    ours = np.asarray(Image.open(tmp_path / "photo_mask.png")) > 0
    clear = np.abs(logits) > 1e-3
    assert clear.mean() > 0.9 and 0 < mask.mean() < 1
    np.testing.assert_array_equal(mask[clear], ours[clear])

    images = padded(pixels)
    adapted = samfast.load_adapted(folder)
    with torch.no_grad():
        exact = segment(samfast.load_adapted(folder, fuse=False).double(), images.double())
        within_budget(segment(sam, images), lambda: segment(adapted, images), exact, torch.float32)
        moved_by = (segment(base, images) - exact).abs().max()
    assert moved_by > 0.1  # what was merged matters


def test_a_safetensors_file_holds_the_same(base, tmp_path):
    folder = adapter(base, samfast.Lora(), tmp_path / "adapter")
    assert merge(folder, tmp_path / "a.pth") == merge(folder, tmp_path / "a.SafeTensors") == 0
    one, other = (
        build_sam("vit_tiny", checkpoint=tmp_path / name, image_size=SIZE).state_dict()
        for name in ("a.pth", "a.SafeTensors")
    )
    assert one.keys() == other.keys() == base.state_dict().keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "method", [samfast.Lora(), samfast.TaLora(tasks=tuple(t.name for t in TASKS))]
)
@pytest.mark.parametrize(
    ("task", "kind", "channel"), [("cells", "binary", 0), ("kinds", "semantic", 2)]
)
def test_a_task_becomes_a_sam_of_its_own(method, task, kind, channel, base, photo, tmp_path):
    folder = adapter(base, method, tmp_path / "adapter", TASKS)
    chosen = ["--class-index", str(channel)] if kind == "semantic" else []
    assert merge(folder, tmp_path / "merged.pth", "--task", task, *chosen) == 0
    images = padded(read_image(photo))
    with torch.no_grad():
        sam = plain_sam(tmp_path / "merged.pth")
        merged, adapted = segment(sam, images), samfast.load_adapted(folder)
        exact = samfast.load_adapted(folder, fuse=False).double()(images.double(), task)
        within_budget(
            merged,
            lambda: adapted(images, task)[:, channel, None],
            exact[:, channel, None],
            torch.float32,
        )
        others = [c for c in range(exact.shape[1]) if c != channel]
        assert all((exact[:, c] - exact[:, channel]).abs().max() > 0.01 for c in others)


def test_a_class_says_how_its_mask_differs(base, tmp_path, capsys):
    folder = adapter(base, samfast.Lora(), tmp_path / "adapter", TASKS)
    words = ("--task", "kinds", "--class-index", "1", "--json")
    assert merge(folder, tmp_path / "m.pth", *words) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert "class 1 is above 0" in note and "highest score" in note
    assert merge(folder, tmp_path / "cells.pth", "--task", "cells", "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_a_model_of_tiles_says_so(base, tmp_path, capsys):
    model = moved(samfast.attach(copy.deepcopy(base), samfast.Lora()))
    folder = samfast.save_adapter(model, tmp_path / "adapter", tile=48, overlap=12)
    assert merge(folder, tmp_path / "m.pth") == 0
    assert "trained on tiles of 48 pixels with an overlap of 12" in capsys.readouterr().out


def sam_model(folder):
    declare_missing_schemas()
    import transformers

    model, found = transformers.SamModel.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval(), transformers.SamProcessor.from_pretrained(folder)


@pytest.mark.slow_on_cpu("binary_head")
@pytest.mark.parametrize("head", [None, binary_head])
def test_a_hugging_face_folder_predicts_the_same(head, base, photo, tmp_path, capsys):
    folder = adapter(base, samfast.Lora(), tmp_path / "adapter", head=head)
    assert merge(folder, tmp_path / "merged") == 0
    assert "SamModel.from_pretrained" in capsys.readouterr().out
    model, processor = sam_model(tmp_path / "merged")
    pixels = read_image(photo)
    inputs = processor(pixels, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE)
    adapted = samfast.load_adapted(folder)
    assert head_of(adapted) == ("binary" if head else "sam")
    images = padded(pixels)
    with torch.no_grad():

        def theirs():
            masks = model(inputs["pixel_values"], multimask_output=False).pred_masks[:, 0]
            return torch.nn.functional.interpolate(masks, (SIZE, SIZE), mode="bilinear")

        exact_model = samfast.load_adapted(folder, fuse=False).double()
        exact = segment(exact_model, images.double())
        within_budget(theirs(), lambda: segment(adapted, images), exact, torch.float32)


def test_there_and_back_through_hugging_face(base, tmp_path):
    """A folder that nothing was trained on comes back bit for bit, and so do its names."""
    state = base.state_dict()
    assert to_segment_anything(to_hugging_face(state)).keys() == state.keys()
    start = adapter(base, samfast.Lora(), tmp_path / "adapter")
    assert merge(start, tmp_path / "hf") == 0
    sam = build_sam("vit_tiny", checkpoint=tmp_path / "hf", image_size=SIZE)
    sam = samfast.attach(sam, samfast.Lora(), train=())  # LoRA starts at zero
    folder = samfast.save_adapter(sam, tmp_path / "untrained")
    assert merge(folder, tmp_path / "again", "--checkpoint", str(tmp_path / "hf")) == 0
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("options", "words", "says"),
    [
        ({"method": samfast.ConvLora()}, ["m.pth"], "cannot be merged.*depends on its input"),
        ({"method": samfast.AdaptFormer()}, ["m.pth"], "cannot be merged.*depends on its input"),
        (
            {"method": samfast.ConvLora(), "head": binary_head},
            ["m.pth"],
            "cannot be merged.*samfast export",
        ),
        ({"head": binary_head}, ["m.pth"], "one mask token.*Hugging Face folder"),
        ({}, ["m.onnx"], r"expected --output to end in \.pth, \.pt, \.safetensors.*got .*m\.onnx"),
        ({}, ["m.pth", "--task", "cells"], "no tasks; leave out --task"),
        ({}, ["m.pth", "--class-index", "1"], "no classes; leave out --class-index"),
        (
            {"tasks": TASKS},
            ["m.pth"],
            "has the tasks kinds, cells, depth.*choose a task",
        ),
        ({"tasks": TASKS}, ["m.pth", "--task", "depth"], "predicts values, but other SAM tools"),
        ({"tasks": TASKS}, ["m.pth", "--task", "kinds"], "expected --class-index 0 to 2, got none"),
        (
            {"tasks": TASKS},
            ["m.pth", "--task", "kinds", "--class-index", "3"],
            "expected --class-index 0 to 2, got 3",
        ),
        ({}, ["m.pth", "--checkpoint", "other.pth"], "other.pth is not its base"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(options, words, says, base, tmp_path, capsys):
    folder = adapter(base, options.get("method", samfast.Lora()), tmp_path / "adapter",
                     options.get("tasks", ()), options.get("head"))  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    assert merge(folder, tmp_path / words[0], *words[1:]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(says, said), said
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_replaced(base, tmp_path, capsys):
    folder = adapter(base, samfast.Lora(), tmp_path / "adapter")
    (tmp_path / "mine.pth").write_bytes(b"mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_bytes(b"mine")
    for name in ("mine.pth", "full"):
        assert merge(folder, tmp_path / name) == 2
        assert "exists; name another" in capsys.readouterr().err
    assert (tmp_path / "mine.pth").read_bytes() == b"mine"
    (tmp_path / "empty").mkdir()
    assert merge(folder, tmp_path / "empty") == 0


def test_what_is_written_is_told_as_json(base, tmp_path, capsys):
    folder = adapter(base, samfast.Lora(), tmp_path / "adapter")
    assert merge(folder, tmp_path / "m.pth", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "vit_tiny" and told["image_size"] == SIZE
    sam = eval(told["opens"], {"samfast": samfast})
    assert sam.state_dict().keys() == base.state_dict().keys()


def test_a_loaded_model_is_one_for_segment_anything(base, photo, tmp_path):
    folder = adapter(base, samfast.ConvLora(), tmp_path / "adapter")
    pixels = read_image(photo)
    sam = samfast.load_adapted(str(folder), device="cpu")
    mask, logits = predicted(sam, pixels)
    assert mask.shape == pixels.shape[:2]
    plain = samfast.load_adapted(folder, fuse=False)
    with torch.no_grad():
        exact = segment(copy.deepcopy(plain).double(), padded(pixels).double())[0, 0, : len(pixels)]

    def stock():
        return torch.from_numpy(predicted(plain, pixels)[1])

    within_budget(torch.from_numpy(logits), stock, exact, torch.float32)
    generator = SamAutomaticMaskGenerator(sam, points_per_side=2, pred_iou_thresh=-1e9)
    assert isinstance(generator.generate(pixels), list)


def test_sam3_becomes_a_folder_for_transformers(tmp_path, capsys):
    tracker = sam3_models.tracker()
    tracker.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    sam = build_sam("sam3", checkpoint=tmp_path / "base")
    folder = samfast.save_adapter(
        moved(samfast.attach(sam, samfast.Lora(target=("q_proj", "v_proj")))), tmp_path / "adapter"
    )
    words = ("--checkpoint", str(tmp_path / "base"))
    assert merge(folder, tmp_path / "merged.pth", *words) == 2
    assert "SAM 3 is written as a folder" in capsys.readouterr().err
    assert merge(folder, tmp_path / "merged", *words) == 0
    import transformers

    merged, found = transformers.Sam3TrackerModel.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(found.values()), found
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == "{}"
    pixels = torch.randn(1, 3, sam3_models.SIDE, sam3_models.SIDE, generator=generator_of(4))
    boxes = torch.tensor([[[4.0, 6.0, 30.0, 40.0]]])

    def masks(model):
        inputs = {"pixel_values": pixels.to(model.dtype), "input_boxes": boxes.to(model.dtype)}
        return model(**inputs, multimask_output=False).pred_masks

    adapted = samfast.load_adapted(folder, tmp_path / "base", fuse=False)
    with torch.no_grad():
        exact = masks(copy.deepcopy(adapted).double())
        within_budget(masks(merged.eval()), lambda: masks(adapted), exact, torch.float32)
        assert (masks(tracker) - exact).abs().max() > 0.01


@pytest.mark.slow
def test_segment_anything_s_registry_opens_a_file(tmp_path, photo):
    from segment_anything import sam_model_registry

    base = build_sam("vit_b", random_init=True, seed=1)
    torch.save(base.state_dict(), tmp_path / "base.pth")
    sam = build_sam("vit_b", checkpoint=tmp_path / "base.pth")
    sam = moved(samfast.attach(sam, samfast.Lora()))
    folder = samfast.save_adapter(sam, tmp_path / "adapter")
    assert merge(folder, tmp_path / "m.pth", "--checkpoint", str(tmp_path / "base.pth")) == 0
    plain = sam_model_registry["vit_b"](checkpoint=str(tmp_path / "m.pth")).eval()
    pixels = read_image(photo)
    mask, logits = predicted(plain, pixels)
    ours, found = predicted(samfast.load_adapted(folder, tmp_path / "base.pth"), pixels)
    clear = np.abs(logits) > 1e-3
    np.testing.assert_array_equal(mask[clear], ours[clear])
    assert np.abs(logits - found).max() < 1e-4 * np.abs(logits).max()
