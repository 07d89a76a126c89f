# SPDX-License-Identifier: Apache-2.0
"""Point prompts: from masks, at random in training alone, and through finetune and predict."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import samfast
from samfast import cli
from samfast.models import build_sam, segment
from samfast.training.data import Collate, EpochSampler, PairDataset, model_size, padded_images
from samfast.training.evaluate import validation_loader
from samfast.training.folders import load_split
from samfast.training.images import read_mask
from samfast.training.loop import finetune
from samfast.training.points import check_point, clicked_point, parsed_point, resized_point
from samfast.training.recipe import with_recipe
from samfast.training.records import output_folder
from samfast.training.segmenters import Segmenter
from samfast.training.settings import FinetuneSettings


def mask_of(*rows: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("mask", "point"),
    [
        (mask_of("....", ".##.", ".##."), (1.5, 1.5, 1)),
        (mask_of("...", "..#"), (2, 1, 1)),
        (mask_of("####", "####", "####"), (1, 1, 1)),
        (mask_of("##...", ".....", "..###", "..###", "..###"), (3, 3, 1)),  # the larger of two
        (mask_of("#####", "#...#", "#...#", "#####"), (0, 0, 1)),  # a ring: not in its hole
        (mask_of("....", "....", "...."), (1.5, 1, 0)),  # no foreground: the centre is none
    ],
)
def test_the_deepest_point_of_a_mask(mask, point):
    assert clicked_point(mask).tolist() == list(point)


def test_the_deepest_point_is_the_centre_of_the_largest_square():
    """Against all squares, one by one, of masks of any shape."""
    rng = np.random.default_rng(0)
    for height, width in ((1, 7), (9, 1), (6, 11), (13, 8)):
        mask = rng.random((height, width)) < 0.8
        x, y, label = clicked_point(mask)
        fits = [
            (side, top, left)
            for side in range(1, min(mask.shape) + 1)
            for top in range(height - side + 1)
            for left in range(width - side + 1)
            if mask[top : top + side, left : left + side].all()
        ]
        side = max(fits)[0]
        _, top, left = min(one for one in fits if one[0] == side)
        assert (x, y, label) == (left + (side - 1) / 2, top + (side - 1) / 2, 1)


def test_random_points_are_on_the_foreground_and_reach_all_of_it():
    mask = mask_of("##..", "#..#", "....")
    rng = np.random.default_rng(0)
    found = [tuple(clicked_point(mask, rng)) for _ in range(200)]
    places = {(x, y, 1.0) for y, x in zip(*np.nonzero(mask), strict=True)}
    assert set(found) == places
    assert min(found.count(place) for place in places) > 25
    assert clicked_point(~mask & mask, rng).tolist() == [1.5, 1, 0]


def test_resized_parsed_and_checked():
    assert resized_point(np.array([10.0, 6, 0]), (48, 64), (24, 128)).tolist() == [20, 3, 0]
    assert parsed_point("60, 4.5").tolist() == [60, 4.5, 1]
    for wrong in ("abc", "1", "1,2,3", "nan,1", "1,inf", "", "1;2"):
        with pytest.raises(
            ValueError, match=f"point is '{wrong}'; expected two numbers x,y such as"
        ):
            parsed_point(wrong)
    check_point(np.array([64.0, 48, 1]), (48, 64), "p")
    for x, y in ((64.5, 1), (-1, 1), (1, 49)):
        with pytest.raises(ValueError, match=f"point {x:g},{y} is not inside image p, .* 64x48"):
            check_point(np.array([x, y, 1.0]), (48, 64), "p")


def points_of(data, keys):
    return np.stack([data[key].box for key in keys])


def test_points_are_a_function_of_seed_pass_and_index_and_lie_on_the_flipped_mask(shared_data):
    pairs = load_split(shared_data).train

    def dataset(**options):
        given = {"prompt": "point", "random_points": True, "flips": True, "seed": 5, **options}
        return PairDataset(pairs, 64, **given)

    keys = [(i, number) for number in range(4) for i in range(len(pairs))]
    whole, plain = points_of(dataset(), keys), PairDataset(pairs, 64, flips=True, seed=5)
    assert np.array_equal(points_of(dataset(), keys[::-1])[::-1], whole)
    assert not np.array_equal(points_of(dataset(seed=6, flips=False), keys), whole)
    assert len(np.unique(whole[:, :2], axis=0)) > len(keys) / 2
    steady = points_of(dataset(random_points=False), keys)
    for key, point, deepest in zip(keys, whole, steady, strict=True):
        sample = plain[key]
        assert sample.box is None and np.array_equal(dataset()[key].image, sample.image)
        sizes = sample.mask.shape, sample.truth.shape
        x, y, label = resized_point(point, *sizes).round().astype(int)
        assert sample.truth[y, x] and label == 1
        own = resized_point(clicked_point(sample.truth), sizes[1], sizes[0])
        assert np.array_equal(deepest, own)


def test_points_do_not_depend_on_workers_and_are_the_deepest_in_validation(shared_data):
    pairs = load_split(shared_data).train
    options = {"flips": True, "prompt": "point", "random_points": True, "seed": 1}
    data = PairDataset(pairs, 64, **options)

    def epoch(workers):
        sampler = EpochSampler(len(data), seed=1, repeats=2)
        collate = Collate(64, truths=False)
        loader = DataLoader(data, 2, sampler=sampler, collate_fn=collate, num_workers=workers)
        return torch.cat([batch.boxes for batch in loader])

    points = epoch(0)
    assert points.shape == (2 * len(pairs), 3) and points.dtype == torch.float32
    assert torch.equal(epoch(2), points)
    found = torch.cat([batch.boxes for batch in validation_loader(pairs, 64, 2, prompt="point")])
    for pair, point in zip(pairs, found, strict=True):
        mask = read_mask(pair.mask) > 0
        own = resized_point(clicked_point(mask), mask.shape, model_size(*mask.shape, 64))
        assert point.tolist() == own.astype(np.float32).tolist()


def test_the_model_is_given_the_points():
    sam = build_sam("vit_tiny", image_size=64, seed=0).eval()
    model = Segmenter(sam)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    sizes = torch.tensor([[64, 64], [40, 64]])
    points = torch.tensor([[3.0, 4, 1], [10.5, 0, 0]])
    with torch.no_grad():
        logits, valid = model(images, sizes, points)
        given = points[:, None, :2], points[:, None, 2].long()
        own = segment(sam, padded_images(images, valid, sam.pixel_mean), points=given)
        assert torch.equal(logits, own[:, 0])
        assert not torch.equal(logits, model(images, sizes)[0])
        assert not torch.equal(logits[0], model(images, sizes, points.flip(0))[0][0])


@pytest.fixture(scope="module")
def run(shared_data, tmp_path_factory):
    """One finished run with points: two steps an epoch."""
    output = tmp_path_factory.mktemp("points") / "out"
    settings = FinetuneSettings(
        **{"data": shared_data, "output": output, "model": "vit_tiny", "image_size": 64},
        **{"epochs": 2, "repeats": 1, "lr": 3e-3, "val_fraction": 0.34, "prompt": "point"},
        **{"overlays": 1},
    )
    return settings, finetune(settings)


def called(capsys, *argv):
    assert cli.main([str(word) for word in (*argv, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow_on_cpu
def test_scores_and_masks_are_those_of_the_remembered_prompt(run, tmp_path, capsys):
    settings, summary = run
    adapter = settings.output / "adapter" / "best"
    extra = samfast.read_adapter_config(adapter)["extra"]
    assert (extra["prompt"], extra["box_jitter"]) == ("point", None)
    pairs = load_split(settings.data, val_fraction=0.34).val
    points, scores = [], []
    for pair in pairs:
        x, y, _ = clicked_point(read_mask(pair.mask) > 0)
        points += ["--point", f"{x},{y}"]
    images = [pair.image for pair in pairs]
    out = ("--output", tmp_path / "out")
    for image in called(capsys, "predict", *images, "--adapter", adapter, *out, *points)["images"]:
        scores.append(image["foreground"])
    for image, share in zip(images, scores, strict=True):  # of one image, the same
        own = points[2 * images.index(image) :][:2]
        one = called(capsys, "predict", image, "--adapter", adapter, *out, *own)["images"]
        assert one[0]["foreground"] == share
    data = tmp_path / "val"
    for kind in ("images", "masks"):
        (data / kind).mkdir(parents=True)
    for pair in pairs:
        (data / "images" / pair.image.name).write_bytes(pair.image.read_bytes())
        (data / "masks" / pair.mask.name).write_bytes(pair.mask.read_bytes())
    found = called(
        capsys, "evaluate", "--data", data, "--adapter", adapter, "--output", tmp_path / "scores"
    )
    assert found["val_dice"] == summary["val_dice"]


def test_predict_refuses_points_that_do_not_fit(run, refused):
    settings, _ = run
    adapter = settings.output / "adapter" / "best"
    images = [settings.data / "images" / f"p{i}.png" for i in range(2)]  # 64x48 and 64x52
    one = ("predict", images[0], "--adapter", adapter)
    two = ("predict", *images, "--adapter", adapter)
    refused(*one, pattern="was trained with a point for each image; give it with --point x,y, in")
    refused(*one, "--box", "0,0,9,9", pattern="with a point for each image; leave out --box")
    refused(*one, "--point", "65,9", pattern=r"point 65,9 is not inside .*p0.png, which is 64x48")
    refused(
        *one, "--point", "abc", pattern="point is 'abc'; expected two numbers x,y such as 60,45"
    )
    three = ("--point", "9,9") * 3
    refused(*two, *three, pattern="got 3 points for 2 images; give one for all, or one for each")
    refused(*two, "--point", "9,50", pattern="point 9,50 is not inside image .*p0.png")


def test_runs_with_points_have_no_jitter_and_a_folder_of_their_own(tmp_path):
    settings = with_recipe(FinetuneSettings(data=tmp_path / "cells", prompt="point"))
    assert settings.box_jitter is None
    assert output_folder(settings).name == "cells-vit_b-lora-point"
