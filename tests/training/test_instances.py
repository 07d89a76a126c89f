# SPDX-License-Identifier: Apache-2.0
"""Objects without prompts: their maps, the watershed that finds them again, scores, and runs."""

import json

import numpy as np
import pytest
from PIL import Image

from samfast import cli
from samfast.training.chosen_tasks import INSTANCES
from samfast.training.object_files import parts
from samfast.training.object_maps import object_maps
from samfast.training.object_numbers import kept_objects, numbered
from samfast.training.object_scores import ObjectScores, matched, object_scores
from samfast.training.task_data import TaskDataset
from samfast.training.task_files import Item
from samfast.training.watershed import objects_of_maps


def discs(size, *circles):
    """Label image of (y, x, radius, number), later ones on top."""
    y, x = np.indices(size)
    labels = np.zeros(size, np.int64)
    for cy, cx, radius, number in circles:
        labels[(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = number
    return labels


TOUCHING = discs((40, 60), (20, 18, 12, 70_000), (20, 41, 12, 255), (4, 57, 2, 9))


def literal_depth(labels):
    """By a loop over objects: the distance to the nearest pixel that is not of the own one's
    inside, which leaves out pixels beside others."""
    from scipy import ndimage

    depth = np.zeros(labels.shape)
    for number in np.unique(labels[labels > 0]):
        own = labels == number
        cross = ndimage.generate_binary_structure(2, 1)
        inside = ndimage.binary_erosion(own, cross, border_value=1)
        away = np.zeros(labels.shape)
        outside = np.argwhere(~inside & (own | (labels != number)))
        for y, x in np.argwhere(own):
            away[y, x] = np.hypot(*(outside - (y, x)).T).min() + 1
        depth[own] = away[own] / away[own].max()
    return depth


def test_maps_are_those_of_a_loop_over_objects():
    maps = object_maps(TOUCHING)
    np.testing.assert_array_equal(maps["foreground"], TOUCHING > 0)
    inside = TOUCHING > 0
    np.testing.assert_allclose(maps["depth"][inside], literal_depth(TOUCHING)[inside], atol=1e-6)
    for number in (70_000, 255, 9):
        own = np.equal(TOUCHING, number)
        for name in ("depth", "centre"):
            assert maps[name][own].max() == 1, (number, name)
        assert maps["centre"][own].min() == pytest.approx(0, abs=1e-6)
        deepest = np.argwhere(own & (maps["centre"] == 1))
        assert len(deepest) == 1 and maps["depth"][tuple(deepest[0])] == 1
    assert np.isnan(maps["depth"][~inside]).all() and np.isnan(maps["centre"][~inside]).all()


@pytest.mark.parametrize(
    "labels", [np.zeros((5, 7)), np.full((5, 7), 3), np.eye(4, dtype=np.uint8)], ids=str
)
def test_maps_of_odd_images(labels):
    maps = object_maps(labels)
    np.testing.assert_array_equal(maps["foreground"], labels > 0)
    for name in ("centre", "depth"):
        values = maps[name][labels > 0]
        assert maps[name].shape == labels.shape and np.isnan(maps[name][labels == 0]).all()
        assert values.size == 0 or (values.min() >= 0 and values.max() == 1)


def test_an_object_that_fills_the_image_has_its_middle_there():
    maps = object_maps(np.ones((41, 61)))
    assert maps["depth"].min() == maps["depth"][0, 0] < maps["depth"][20, 30] == 1
    y, x = np.unravel_index(maps["centre"].argmax(), (41, 61))
    assert y == 20 and 20 <= x <= 40


def test_the_watershed_finds_the_objects_again():
    maps = {name: np.nan_to_num(values) for name, values in object_maps(TOUCHING).items()}
    found = objects_of_maps(maps["foreground"] > 0, maps["centre"], maps["depth"])
    assert matched(found, TOUCHING) == (3, 0, 0, pytest.approx(3, abs=0.1))
    large = objects_of_maps(maps["foreground"] > 0, maps["centre"], maps["depth"], min_size=20)
    assert matched(large, TOUCHING)[:3] == (2, 0, 1)
    flat = objects_of_maps(maps["foreground"] > 0, 0 * maps["centre"], maps["depth"])
    assert flat.max() == 2  # no seed: the connected parts, of which two discs make one


def test_numbers():
    labels, count = numbered(np.array([[7, 0], [300, 7]]))
    assert count == 2 and labels.tolist() == [[1, 0], [2, 1]] and labels.dtype == np.int32
    assert numbered(np.array([[4, 4]]))[0].tolist() == [[1, 1]]  # no pixel of the background
    assert kept_objects(np.array([[9, 9, 0, 2]]), 2).tolist() == [[1, 1, 0, 0]]
    assert parts(np.array([[1, 0, 1], [0, 0, 1]], bool)).tolist() == [[1, 0, 2], [0, 0, 2]]


def test_scores_are_counts_of_objects():
    truth = discs((30, 60), (15, 12, 8, 1), (15, 35, 8, 2), (15, 52, 5, 3))
    found = np.where(truth == 1, 5, 0)
    found[truth == 2] = 6
    found[:, 35:][truth[:, 35:] == 2] = 7  # half of it each: an IoU of at most a half
    right, added, missed, iou = matched(found, truth)
    larger = (found == 7).sum() / (truth == 2).sum()
    assert larger > 0.5  # the middle column is in it
    assert (right, added, missed) == (2, 1, 1) and iou == pytest.approx(1 + larger)
    assert object_scores(right, added, missed, iou) == {"ap50": 0.5, "pq": iou / 3}
    assert object_scores(0, 0, 0, 0.0) == {"ap50": None, "pq": None}
    scores = ObjectScores()
    scores.update((0, 0, 0, 0.0))
    assert scores.compute() == {"ap50": 1.0, "pq": 1.0}
    scores.update((2, 1, 1, 1.5))
    scores.update((0, 0, 4, 0.0))
    assert scores.compute() == {"ap50": 0.25, "pq": pytest.approx(1.5 / 5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of dark discs on a light ground; masks of 8, 16 and 32 bits."""
    folder, draw = tmp_path_factory.mktemp("cells"), np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(6):
        y, x = draw.integers(12, 50), draw.integers(12, 30)  # of two discs that touch
        circles = [(y, x + 20 * k, 10, 200 * k + 55) for k in (0, 1)]
        labels = discs((64, 64), *circles)
        image = np.where(labels > 0, 60, 200) + draw.normal(0, 5, labels.shape)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"images/{i}.png")
        kind = (np.uint8, np.uint16, np.int32)[i % 3]
        Image.fromarray(labels.astype(kind)).save(folder / f"masks/{i}.{('png', 'tif')[i % 3 > 0]}")
    return folder


def test_targets_are_of_objects_as_the_model_sees_them(folder):
    """Mirrored with the image, and made after resizing; 255 is an object as any other."""
    path = folder / "masks" / "0.png"
    item = Item("0", folder / "images" / "0.png", {spec.name: path for spec in INSTANCES})
    labels = np.asarray(Image.open(path))
    assert set(np.unique(labels)) == {0, 55, 255}
    data = TaskDataset([item], INSTANCES, 32, flips=True, seed=1, truths=False)
    for number in range(4):
        sample = data[0, number]
        axes = [axis for axis in (0, 1) if axis in flips_of(data, number)]
        small = np.asarray(Image.fromarray(np.flip(labels, axes)).resize((32, 32), 0))
        for spec in INSTANCES:
            made = object_maps(small)[spec.derive]
            target = sample.targets[spec.name]
            np.testing.assert_array_equal(target if target.ndim == 2 else target[0], made)
        assert sample.truths == {}


def flips_of(data, number):
    from samfast.training.data import flipped_axes

    return flipped_axes(data.seed, number, 0)


def run(*argv):
    return cli.main([str(word) for word in argv])


def train(folder, output, epochs, repeats):
    options = ["--model", "vit_tiny", "--image-size", 64, "--epochs", epochs, "--repeats", repeats]
    argv = ["finetune", "--data", folder, "--masks", "instances", *options, "--lr", 3e-3]
    assert run(*argv, "--output", output) == 0
    return output


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    return train(folder, tmp_path_factory.mktemp("run") / "out", 1, 2)


@pytest.mark.slow
def test_discs_that_touch_are_told_apart(folder, tmp_path):
    """Which connected parts of the foreground would not."""
    summary = json.loads((train(folder, tmp_path / "run", 3, 8) / "summary.json").read_text())
    assert summary["val_ap50"] > 0.9 and summary["tasks"]["depth"]["abs"] < 0.15


def test_an_adapter_predicts_and_scores(trained, folder, tmp_path, capsys):
    table = (trained / "metrics.csv").read_text().splitlines()
    assert {"val_ap50", "val_pq", "val_depth_abs"} <= set(table[0].split(","))
    capsys.readouterr()
    assert run("evaluate", "--adapter", trained, "--data", folder, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    objects = [row for row in scores["per_image"] if row["task"] == "objects"]
    assert len(objects) == 6 and sum(row["found"] + row["missed"] for row in objects) == 12
    counts = {name: sum(row[name] for row in objects) for name in ("found", "added", "missed")}
    assert scores["val_ap50"] == pytest.approx(counts["found"] / sum(counts.values()))
    argv = ["predict", folder / "images", "--adapter", trained, "--json"]
    assert run(*argv, "--output", tmp_path / "a") == 0
    written = json.loads(capsys.readouterr().out)["images"]
    labels = np.asarray(Image.open(written[0]["labels"]))
    assert labels.shape == (64, 64) and labels.max() == written[0]["objects"]
    assert run(*argv, "--output", tmp_path / "b", "--tile", 64) == 0  # one tile is the whole image
    for name in ("0_labels.tif", "5_labels.tif"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--masks", "instances", "--foreground", "1"],
            "foreground is an option for binary masks",
        ),
        (["--masks", "classes"], "their number is missing; give --classes N"),
        (["--classes", "3", "--masks", "binary"], "classes is 3, but masks is binary"),
        (
            ["--classes", "3", "--prompt", "box"],
            "prompt is box, but classes take no prompts; leave out --prompt",
        ),
        (
            ["--masks", "instances", "--loss", "bce-dice"],
            "loss is bce-dice, an option for one mask",
        ),
        (["--masks", "instances", "--model", "sam3"], "leave out --masks instances, or use"),
        (["--masks", "instances", "--tasks", "t.yaml"], "but --tasks says what masks hold"),
        (["--classes", "1"], "classes is 1; it must be at least 2"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, sentence, folder, tmp_path, capsys):
    assert run("finetune", "--data", folder, "--output", tmp_path / "o", *options) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_masks_that_are_no_objects(folder, tmp_path, capsys):
    """Objects that cannot be, none at all, and many values where none was said."""
    import shutil

    data = shutil.copytree(folder, tmp_path / "data")
    argv = ["finetune", "--data", data, "--model", "vit_tiny", "--image-size", 32]
    assert run(*argv, "--output", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert all(way in error for way in ("--foreground any", "--masks classes", "--masks instances"))
    for values, sentence in ((-3, "holds the value -3"), (0, "has a foreground pixel")):
        for path in (data / "masks").iterdir():
            path.unlink()
        for i in range(6):
            mask = np.full((64, 64), values, np.int32)
            Image.fromarray(mask).save(data / f"masks/{i}.tif")
        assert run(*argv, "--masks", "instances", "--output", tmp_path / "o") == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.slow_on_cpu
def test_classes_are_a_task(tmp_path, capsys):
    """--classes 3 trains, remembers and predicts as a file of one semantic task."""
    for name in ("images", "masks"):
        (tmp_path / "d" / name).mkdir(parents=True)
    for i in range(3):
        mask = np.tile(np.array([0, 1, 2, 255], np.uint8), (8, 2))
        Image.fromarray(mask).save(tmp_path / f"d/masks/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"d/images/{i}.png")
    argv = ["finetune", "--data", tmp_path / "d", "--model", "vit_tiny", "--image-size", 32]
    more = ["--epochs", 1, "--repeats", 1, "--output", tmp_path / "o", "--json"]
    assert run(*argv, "--classes", 3, *more) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["classes"].keys() == {"miou", "accuracy"}
    adapter = json.loads((tmp_path / "o/adapter/best/adapter_config.json").read_text())
    assert adapter["extra"]["tasks"][0]["channels"] == 3


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("masks", [["--masks", "instances"], ["--classes", "256"]], ids=len)
def test_masks_with_a_suffix(folder, masks, tmp_path, capsys):
    """Beside their images, as for one mask."""
    for path in sorted((folder / "masks").iterdir()):
        labels = np.asarray(Image.open(path)).astype(int) % 256
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / f"{path.stem}_mask.png")
        Image.open(folder / "images" / f"{path.stem}.png").save(tmp_path / f"{path.stem}.png")
    argv = ["finetune", "--data", tmp_path, *masks, "--model", "vit_tiny", "--image-size", 32]
    argv += ["--epochs", 1, "--repeats", 1, "--output", tmp_path.parent / f"o{len(masks[0])}"]
    assert run(*argv, "--mask-suffix", "_mask") == 0
    assert run("evaluate", "--adapter", argv[-1], "--data", tmp_path, "--mask-suffix", "_mask") == 0
    assert run(*argv, "--overwrite") == 2  # where there are neither images/ nor masks/
