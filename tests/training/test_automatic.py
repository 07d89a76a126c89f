# SPDX-License-Identifier: Apache-2.0
"""The automatic mask generator on an adapted model, and suppression without torchvision."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from samfast import cli
from samfast.models import build_sam
from samfast.training.automatic import automatic_objects, batched_nms, suppression_in_torch


def literal(boxes, scores, idxs, threshold):
    """Each box in the order of the scores against each one that is kept."""
    kept = []
    for i in scores.argsort(descending=True).tolist():
        for j in kept:
            low = torch.maximum(boxes[i, :2], boxes[j, :2])
            high = torch.minimum(boxes[i, 2:], boxes[j, 2:])
            common = (high - low).clamp(min=0).prod()
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (boxes[i], boxes[j])]
            if idxs[i] == idxs[j] and common / (sum(areas) - common) > threshold:
                break
        else:
            kept.append(i)
    return kept


def test_suppression():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(60, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + 1 + torch.rand(60, 2, generator=generator) * 20], 1)
    scores, idxs = torch.rand(60, generator=generator), torch.randint(2, (60,), generator=generator)
    for threshold in (0.2, 0.5, 0.9):
        kept = batched_nms(boxes, scores, idxs, threshold).tolist()
        assert kept == literal(boxes, scores, idxs, threshold)
    assert batched_nms(boxes, scores, idxs, 0.2).numel() < 60
    assert batched_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 0.5).shape == (0,)


@pytest.fixture(scope="module")
def sam():
    return build_sam("vit_tiny", image_size=64, random_init=True, seed=0).eval()


def test_labels_are_the_generator_s_masks(sam):
    """The larger first, so that the smaller is on top; nothing where no mask is good enough."""
    from segment_anything import SamAutomaticMaskGenerator

    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    options = {"points_per_side": 4, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0}
    labels = automatic_objects(sam, image, **options)
    generator = SamAutomaticMaskGenerator(sam, **options)
    predict = generator.predictor.predict_torch
    tokens = []

    def of_one(coords, points, multimask_output, return_logits):
        found = predict(coords, points, multimask_output=False, return_logits=return_logits)
        tokens.append(found[0].shape[1])
        return found

    generator.predictor.predict_torch = of_one
    with suppression_in_torch():
        found = generator.generate(image)
    assert set(tokens) == {1}  # the token that is trained, not the three of several masks
    assert found
    expected = np.zeros(labels.shape, bool)
    for mask in found:
        expected |= mask["segmentation"]
    np.testing.assert_array_equal(labels > 0, expected)
    smallest = min(found, key=lambda mask: mask["area"])["segmentation"]
    assert len(np.unique(labels[smallest])) == 1
    assert not automatic_objects(sam, image, points_per_side=2, pred_iou_thresh=9.0).any()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("points")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(2):
        mask = np.zeros((40, 40), np.uint8)
        mask[10:30, 5 + 9 * i : 25 + 9 * i] = 255
        for name in ("images", "masks"):
            Image.fromarray(mask).save(folder / name / f"{i}.png")
    options = ["--model", "vit_tiny", "--image-size", 64, "--epochs", 1, "--repeats", 1]
    argv = ["finetune", "--data", folder, "--prompt", "point", *options, "--output", folder / "run"]
    assert cli.main([str(word) for word in argv]) == 0
    return folder


@pytest.mark.slow_on_cpu
def test_the_command_needs_no_prompt(adapter, tmp_path, capsys):
    options = ["--automatic", "--points-per-side", 3, "--pred-iou-thresh=-9", "--json"]
    options += ["--stability-score-thresh", 0, "--output", tmp_path]
    argv = ["predict", adapter / "images", "--adapter", adapter / "run", *options]
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 0
    for made in json.loads(capsys.readouterr().out)["images"]:
        labels = np.asarray(Image.open(made["labels"]))
        assert labels.shape == (40, 40) and labels.max() == made["objects"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--pred-iou-thresh", "0.5"],
            "pred_iou_thresh is 0.5, but there is no grid; give",
        ),
        (["--automatic", "--stability-score-thresh", "nan"], "is nan; it must be a finite number"),
    ],
    ids=len,
)
def test_options_of_the_grid(adapter, options, sentence, tmp_path, capsys):
    argv = ["predict", adapter / "images", "--adapter", adapter / "run", *options]
    argv += [] if "--automatic" in options else ["--point", "4,4"]
    assert cli.main([str(word) for word in [*argv, "--output", tmp_path / "o"]]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "o").exists()


@pytest.mark.parametrize("other", [["--tile", "64"], ["--point", "4,4"]], ids=str)
def test_what_does_not_go_with_it(adapter, other, tmp_path, capsys):
    argv = ["predict", adapter / "images", "--adapter", adapter / "run", "--automatic", *other]
    assert cli.main([str(word) for word in [*argv, "--output", tmp_path / "o"]]) == 2
    assert f"leave out {other[0]}" in capsys.readouterr().err and not (tmp_path / "o").exists()
