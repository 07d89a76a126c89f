# SPDX-License-Identifier: Apache-2.0
"""Box prompts: from masks, moved in training alone, and through finetune and predict."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import samfast
from samfast import cli
from samfast.integrations import segment_anything
from samfast.models import build_sam, segment
from samfast.training import segmenters
from samfast.training.boxes import foreground_box, jittered_box, parsed_box, resized_box
from samfast.training.data import Collate, EpochSampler, PairDataset, model_size, padded_images
from samfast.training.evaluate import evaluate, validation_loader
from samfast.training.folders import load_split
from samfast.training.images import read_mask
from samfast.training.loop import finetune
from samfast.training.metrics import ForegroundScores
from samfast.training.predict import load_adapted
from samfast.training.recipe import with_recipe
from samfast.training.records import output_folder
from samfast.training.segmenters import Segmenter
from samfast.training.settings import FinetuneSettings

TINY = ("--model", "vit_tiny", "--image-size", "64")


def mask_of(*rows: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("mask", "box"),
    [
        (mask_of("....", ".##.", ".#.."), (1, 1, 2, 2)),
        (mask_of("#....", ".....", "...#."), (0, 0, 3, 2)),  # two objects, one box
        (mask_of("...", "..#"), (2, 1, 2, 1)),
        (mask_of("###", "###"), (0, 0, 2, 1)),
        (mask_of("...", "..."), (0, 0, 2, 1)),  # no foreground: all of the image
    ],
)
def test_the_box_of_a_mask(mask, box):
    assert foreground_box(mask).tolist() == list(box)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (303, 384), (64, 17)])
def test_boxes_are_resized_as_segment_anything_does(height, width):
    transform = segment_anything.load().predictor.ResizeLongestSide(64)
    box = np.array([1.0, 2.0, width - 5, height - 1])
    ours = resized_box(box, (height, width), model_size(height, width, 64))
    assert np.array_equal(ours, transform.apply_boxes(box, (height, width))[0])


@pytest.mark.parametrize("box", [(8, 4, 20, 30), (0, 0, 39, 31), (5, 5, 5, 5)])
def test_jitter_is_bounded_and_leaves_a_box_in_the_image(box):
    box, rng = np.array(box, np.float64), np.random.default_rng(0)
    moved = np.stack([jittered_box(box, 6.0, (32, 40), rng) for _ in range(400)])
    assert np.abs(moved - box).max() <= 6
    assert (moved[:, :2] <= moved[:, 2:]).all()
    assert (moved >= 0).all() and (moved <= [40, 32, 40, 32]).all()
    if box[0] == 8:  # far from passing, and from the left and the right edge: uniform
        for side in (0, 2):
            shares = np.histogram(moved[:, side] - box[side], 4, (-6, 6))[0] / 400
            assert shares.min() > 0.15 and shares.max() < 0.35


def boxes_of(data, keys):
    return np.stack([data[key].box for key in keys])


def test_jitter_is_a_function_of_seed_pass_and_index(shared_data):
    """So a run that begins anywhere draws what the whole run drew there; flips stay as they are."""
    pairs = load_split(shared_data).train

    def dataset(**options):
        return PairDataset(pairs, 64, **{"prompt": "box", "box_jitter": 3.0, "seed": 5, **options})

    keys = [(i, number) for number in range(4) for i in range(len(pairs))]
    whole, exact = boxes_of(dataset(), keys), boxes_of(dataset(box_jitter=0.0), keys)
    assert np.array_equal(boxes_of(dataset(), keys[::-1])[::-1], whole)
    moved = np.abs(whole - exact)
    assert moved.min() > 0 and moved.max() > 2 and moved.max() <= 3
    assert len(np.unique(moved)) == moved.size
    assert not np.array_equal(boxes_of(dataset(seed=6), keys), whole)
    flipped, plain = dataset(flips=True), PairDataset(pairs, 64, flips=True, seed=5)
    for key in keys:
        sample = flipped[key]
        assert np.array_equal(sample.image, plain[key].image) and plain[key].box is None
        own = resized_box(foreground_box(sample.truth), sample.truth.shape, sample.mask.shape)
        assert np.abs(sample.box - own).max() <= 3


def test_boxes_do_not_depend_on_workers_and_are_exact_in_validation(shared_data):
    pairs = load_split(shared_data).train
    data = PairDataset(pairs, 64, flips=True, prompt="box", box_jitter=4.0, seed=1)

    def epoch(workers):
        sampler = EpochSampler(len(data), seed=1, repeats=2)
        collate = Collate(64, truths=False)
        loader = DataLoader(data, 2, sampler=sampler, collate_fn=collate, num_workers=workers)
        return torch.cat([batch.boxes for batch in loader])

    boxes = epoch(0)
    assert boxes.shape == (2 * len(pairs), 4) and boxes.dtype == torch.float32
    assert torch.equal(epoch(2), boxes)
    for pass_over in range(2):
        loader = validation_loader(pairs, 64, 2, prompt="box")
        for pair, box in zip(pairs, torch.cat([batch.boxes for batch in loader]), strict=True):
            mask = read_mask(pair.mask) > 0
            exact = resized_box(foreground_box(mask), mask.shape, model_size(*mask.shape, 64))
            assert box.tolist() == exact.astype(np.float32).tolist(), pass_over
    assert next(iter(validation_loader(pairs, 64, 2))).boxes is None


def test_the_model_is_given_the_boxes():
    sam = build_sam("vit_tiny", image_size=64, seed=0).eval()
    model = Segmenter(sam)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    sizes = torch.tensor([[64, 64], [40, 64]])
    boxes = torch.tensor([[3.0, 4, 30, 20], [10, 0, 50.5, 39]])
    with torch.no_grad():
        logits, valid = model(images, sizes, boxes)
        own = segment(sam, padded_images(images, valid, sam.pixel_mean), boxes)
        assert torch.equal(logits, own[:, 0])
        assert not torch.equal(logits, model(images, sizes)[0])
        assert not torch.equal(logits, model(images, sizes, boxes + 4)[0])


@pytest.fixture(scope="module")
def run(shared_data, tmp_path_factory):
    """One finished run with boxes: two steps an epoch."""
    output = tmp_path_factory.mktemp("boxes") / "out"
    settings = FinetuneSettings(
        **{"data": shared_data, "output": output, "model": "vit_tiny", "image_size": 64},
        **{"epochs": 2, "repeats": 1, "lr": 3e-3, "val_fraction": 0.34, "prompt": "box"},
        **{"box_jitter": 2.5, "overlays": 1},
    )
    return settings, finetune(settings)


def test_a_run_with_boxes_learns_and_says_so_in_its_files(run):
    settings, summary = run
    with (settings.output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    saved = json.loads((settings.output / "settings.json").read_text())
    assert (saved["prompt"], saved["box_jitter"]) == ("box", 2.5)
    for which in ("best", "last"):
        extra = samfast.read_adapter_config(settings.output / "adapter" / which)["extra"]
        assert (extra["prompt"], extra["box_jitter"]) == ("box", 2.5)
    assert len(list((settings.output / "overlays").iterdir())) == 1
    sam = load_adapted(settings.output / "adapter" / "best")
    pairs = load_split(settings.data, val_fraction=0.34).val
    scores = evaluate(Segmenter(sam), validation_loader(pairs, 64, 2, prompt="box"))
    assert scores == (summary["val_dice"], summary["val_iou"])
    assert not any(p.requires_grad for p in sam.prompt_encoder.parameters())


@pytest.fixture
def seen(monkeypatch):
    """(training or not, boxes) of every batch that a model segments."""
    batches, whole = [], segmenters.segment

    def watched(sam, images, boxes, **options):
        batches.append((sam.training, boxes))
        return whole(sam, images, boxes, **options)

    monkeypatch.setattr(segmenters, "segment", watched)
    return batches


@pytest.mark.slow_on_cpu
def test_the_same_seed_gives_the_same_bytes_and_the_boxes_are_those_of_the_data(
    run, tmp_path, seen
):
    settings, _ = run
    finetune(replace(settings, output=tmp_path / "again"))
    name = "adapter/last/adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (settings.output / name).read_bytes()

    split = load_split(settings.data, val_fraction=0.34)
    options = {"prompt": "box", "flips": True, "box_jitter": 2.5, "seed": settings.seed}
    train, sampler = PairDataset(split.train, 64, **options), EpochSampler(4, settings.seed)
    shown = []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        shown += list(sampler)
    trained = torch.cat([boxes for training, boxes in seen if training])
    assert np.array_equal(trained, boxes_of(train, shown).astype(np.float32))
    exact = [batch.boxes for batch in validation_loader(split.val, 64, 2, prompt="box")]
    validated = torch.cat([boxes for training, boxes in seen if not training])
    assert len(validated) in (5, 6)  # two images an epoch, and the overlay of each best one
    for box in validated:
        assert (box == torch.cat(exact)).all(1).any()


def test_boxes_of_photographs_are_resized_with_them(run, tmp_path, seen):
    settings, _ = run
    images = [settings.data / "images" / f"p{i}.png" for i in (0, 5)]
    arguments = ["predict", *images, "--adapter", settings.output / "adapter"]
    arguments += ["--output", tmp_path / "out", "--box", "34,0,51,48"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert torch.cat([boxes for _, boxes in seen]).tolist() == [
        [34, 0, 51, 48],  # 64 pixels wide and 48 high
        np.float32([34 * 60 / 64, 0, 51 * 60 / 64, 48 * 64 / 68]).tolist(),  # 64 x 68
    ]


def test_predict_with_the_boxes_of_the_truth_scores_the_same(run, tmp_path, capsys):
    settings, summary = run
    pairs = load_split(settings.data, val_fraction=0.34).val
    truths = [read_mask(pair.mask) > 0 for pair in pairs]
    arguments = ["predict", "--adapter", settings.output / "adapter", "--output", tmp_path / "out"]
    for truth in truths:
        arguments += ["--box", ",".join(map(str, foreground_box(truth)))]
    arguments += ["--json", *(pair.image for pair in pairs)]
    assert cli.main([str(argument) for argument in arguments]) == 0
    scores = ForegroundScores()
    written = json.loads(capsys.readouterr().out)["images"]
    for truth, one in zip(truths, written, strict=True):
        mask = np.asarray(Image.open(one["mask"])) > 0
        scores.update(torch.from_numpy(mask), torch.from_numpy(truth))
    assert scores.compute() == (summary["val_dice"], summary["val_iou"])


def test_predict_refuses_boxes_that_do_not_fit(run, refused, tmp_path):
    settings, _ = run
    adapter = settings.output / "adapter" / "best"
    images = [settings.data / "images" / f"p{i}.png" for i in range(2)]  # 64x48 and 64x52
    one = ("predict", images[0], "--adapter", adapter)
    two = ("predict", *images, "--adapter", adapter)
    refused(*one, pattern="was trained with a box for each image; give it with --box x0,y0,x1,y1")
    refused(*one, "--box", "0,0,65,9", pattern=r"box 0,0,65,9 is not inside .*p0.png, .* 64x48")
    refused(*one, "--box", "0,0,9,48.5", pattern="box 0,0,9,48.5 is not inside")
    refused(*one, "--box", "-1,0,9,9", pattern="box -1,0,9,9 is not inside")
    refused(*one, "--box", "9,0,8,9", pattern="box is '9,0,8,9'; expected x0,y0,x1,y1")
    for wrong in ("1,2,3", "1,2,3,4,5", "a,b,c,d", "0,0,nan,4", "0,0,inf,4"):
        refused(*one, "--box", wrong, pattern=f"box is '{wrong}'; expected four numbers")
    three = ("--box", "0,0,9,9") * 3
    refused(*two, *three, pattern="got 3 boxes for 2 images; give one for all, or one for each")
    refused(*two, "--box", "0,0,9,50", pattern="box 0,0,9,50 is not inside image .*p0.png")
    assert parsed_box("0, 0,9,9.5").tolist() == [0, 0, 9, 9.5]


def test_an_adapter_says_what_prompts_it(run, refused, tmp_path):
    settings, _ = run
    image = settings.data / "images" / "p0.png"
    sam = load_adapted(settings.output / "adapter" / "best")
    for extra, arguments, pattern in (
        ({}, ("--box", "0,0,9,9"), "was trained without prompts; leave out --box"),
        ({"prompt": "text"}, (), "was trained with prompt 'text'; known are none, box, point"),
    ):
        folder = samfast.save_adapter(sam, tmp_path / f"saved{len(extra)}", **extra)
        refused("predict", image, "--adapter", folder, *arguments, pattern=pattern)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--prompt", "text"), "unknown prompt 'text'; known are none, box, point"),
        (("--box-jitter", "5"), r"box_jitter is 5\.0, but prompt none has no box"),
        (("--prompt", "box", "--box-jitter", "-1"), r"box_jitter is -1\.0; it must be at least 0"),
        (("--prompt", "box", "--box-jitter", "nan"), "box_jitter is nan"),
        (("--prompt", "box", "--box-jitter", "65"), r"box_jitter is 65\.0; it must be at most 64,"),
    ],
)
def test_options_of_prompts(refused, shared_data, arguments, pattern):
    refused("finetune", "--data", shared_data, *TINY, *arguments, pattern=pattern)


def test_the_jitter_is_a_fiftieth_of_the_image_and_runs_have_a_folder_of_their_own(tmp_path):
    def recipe(**options):
        return with_recipe(FinetuneSettings(data=tmp_path / "cells", **options))

    assert recipe(prompt="box").box_jitter == 20 and recipe().box_jitter is None
    assert recipe(prompt="box", model="vit_tiny").box_jitter == 5
    assert recipe(prompt="box", image_size=512).box_jitter == 10
    assert recipe(prompt="box", box_jitter=0.0).box_jitter == 0
    folders = [output_folder(recipe(prompt=prompt)).name for prompt in ("none", "box")]
    assert folders == ["cells-vit_b-lora", "cells-vit_b-lora-box"]
