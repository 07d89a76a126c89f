# SPDX-License-Identifier: Apache-2.0
"""Runs whose images are slices of stacks, and the files of their predictions."""

import csv
import json

import numpy as np
import pytest
import tifffile
from PIL import Image
from stacks_folder import fill_with_stacks, volume, write_stack

from samfast import cli

SLICES = (3, 2, 1)
NAMES = ["v0.tif[0]", "v0.tif[1]", "v0.tif[2]", "v1.npy[0]", "v1.npy[1]", "v2"]
KINDS = {
    "binary": [],
    "instances": ["--masks", "instances"],
    "classes": ["--classes", 3],
    "objects": ["--masks", "instances", "--prompt", "box"],
}


def run(*argv):
    return cli.main([str(word) for word in argv])


def train(folder, kind, repeats=1):
    data = fill_with_stacks(folder / "data", SLICES, binary=kind == "binary")
    options = ["--model", "vit_tiny", "--image-size", 64, "--epochs", 1, "--repeats", repeats]
    argv = ["finetune", "--data", data, "--stacks", *KINDS[kind], *options, "--batch-size", 4]
    assert run(*argv, "--output", folder / "run", "--lr", 3e-3) == 0
    return folder


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    return train(tmp_path_factory.mktemp("binary"), "binary", 12)


@pytest.fixture(scope="module")
def instances(tmp_path_factory):
    return train(tmp_path_factory.mktemp("instances"), "instances")


def predicted(folder, capsys, images, *options):
    capsys.readouterr()
    argv = ["predict", "--adapter", folder / "run", "--json", "--output", folder / "out"]
    assert run(*argv, *images, *options) == 0
    return json.loads(capsys.readouterr().out)["images"]


def test_a_run_names_slices_everywhere(binary):
    settings = json.loads((binary / "run/settings.json").read_text())
    assert settings["stacks"] is True
    assert sorted(settings["train"] + settings["val"]) == NAMES
    with (binary / "run/scores.csv").open() as file:
        assert sorted(row["image"] for row in csv.DictReader(file)) == sorted(settings["val"])
    shown = {path.stem for path in (binary / "run/overlays").iterdir()}
    assert shown <= set(settings["val"]) and shown


@pytest.mark.slow_on_cpu(but=["binary"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_masks_trains_and_is_scored(kind, tmp_path, capsys, request):
    folder = request.getfixturevalue(kind) if kind in ("binary", "instances") else None
    folder = folder or train(tmp_path, kind)
    capsys.readouterr()
    argv = ["evaluate", "--adapter", folder / "run", "--data", folder / "data", "--json"]
    assert run(*argv, "--stacks", "--output", folder / "scores") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 6
    assert sorted({row["image"] for row in scores["per_image"]}) == NAMES
    assert (folder / "scores/scores.csv").read_text().count("v0.tif[2],") >= 1
    shown = [path.stem for path in (folder / "scores").iterdir()]
    assert all(any(stem.startswith(name) for stem in shown) for name in NAMES)


def test_a_stack_gives_stacks_whose_pages_are_those_of_its_slices(binary, capsys, tmp_path):
    data, image = binary / "data/images", volume(0, 3)[0]
    options = ["--probabilities", "--instances", "--formats", "labels", "csv", "coco"]
    options += ["--batch-size", 1]  # the same sums alone
    stacks = [data / "v0.tif", data / "v1.npy"]
    made = predicted(binary, capsys, stacks, "--stacks", *options)
    assert [own["image"] for own in made] == [str(data / name) for name in NAMES[:5]]
    out = binary / "out"
    coco = json.loads((out / "coco.json").read_text())
    assert [own["file_name"] for own in coco["images"]] == NAMES[:5]
    for i, page in enumerate(image):
        Image.fromarray(page).save(tmp_path / f"{i}.png")
    alone = predicted(binary, capsys, [tmp_path], *options)
    for kind, suffix in (("mask", "png"), ("labels", "tif"), ("probability", "tif")):
        pages = tifffile.imread(out / f"v0_{kind}.tif")
        assert pages.shape == (3, 40, 48)
        for i, page in enumerate(pages):
            assert made[i][kind] == str(out / f"v0_{kind}.tif")
            own = out / f"{i}_{kind}.{suffix}"
            own = np.asarray(Image.open(own)) if suffix == "png" else tifffile.imread(own)
            np.testing.assert_array_equal(page, own)
    for i, own in enumerate(alone):
        assert made[i]["foreground"] == own["foreground"] and made[i]["objects"] == own["objects"]
        assert (out / f"v0.tif[{i}]_overlay.png").read_bytes() == (
            out / f"{i}_overlay.png"
        ).read_bytes()
        table = (out / f"v0.tif[{i}]_objects.csv").read_text()
        assert table == (out / f"{i}_objects.csv").read_text()


@pytest.mark.parametrize("tile", [[], ["--tile", 16, "--overlap", 4]], ids=["whole", "tiles"])
def test_above_a_half_is_the_mask_that_is_written(binary, capsys, tile):
    images = [binary / "data/images" / name for name in ("v0.tif", "v2.tif")]
    predicted(binary, capsys, images, "--stacks", "--probabilities", *tile)
    for name, ending in (("v0", "tif"), ("v2", "png")):
        values = tifffile.imread(binary / f"out/{name}_probability.tif")
        assert values.dtype == np.float32
        path = binary / f"out/{name}_mask.{ending}"
        mask = tifffile.imread(path) if ending == "tif" else np.asarray(Image.open(path))
        assert 0 < (mask > 0).mean() < 1
        np.testing.assert_array_equal(values > 0.5, mask > 0)


@pytest.mark.slow_on_cpu
def test_objects_of_a_stack_are_numbered_in_each_slice(instances, capsys):
    images = [instances / "data/images" / name for name in ("v0.tif", "v2.tif")]
    made = predicted(instances, capsys, images, "--stacks", "--probabilities")
    pages = tifffile.imread(instances / "out/v0_labels.tif")
    assert pages.shape == (3, 40, 48)
    for page, own in zip(pages, made, strict=False):
        assert own["objects"] == page.max() == len(np.unique(page[page > 0]))
    foreground = tifffile.imread(instances / "out/v0_probability.tif") > 0.5
    assert foreground.shape == pages.shape and foreground[pages > 0].all()


@pytest.mark.slow_on_cpu
def test_classes_of_a_stack_have_a_page_of_each_slice(tmp_path, capsys):
    folder = train(tmp_path, "classes")
    image = [folder / "data/images/v0.tif"]
    for tile in ([], ["--tile", 16]):
        made = predicted(folder, capsys, image, "--stacks", "--probabilities", *tile)
        classes = tifffile.imread(folder / "out/v0_classes.tif")
        assert classes.shape == (3, 40, 48)
        for page, own in zip(classes, made, strict=True):
            values = tifffile.imread(own["tasks"]["classes"]["probability"])
            assert values.shape == (3, 40, 48)
            np.testing.assert_array_equal(values.argmax(0), page)


def test_what_does_not_fit_is_refused(binary, tmp_path, refused):
    data = binary / "data/images"
    argv = ["predict", "--adapter", binary / "run"]
    refused(*argv, data / "v0.tif", pattern=r"v0\.tif holds 3 frames; .* give --stacks")
    refused(*argv, data / "v1.npy", pattern=r"v1\.npy is an array; give --stacks")
    again = write_stack(tmp_path / "v0.tif", volume(0, 3)[0])
    same = r"two images are called v0\.tif\[0\]; predict them separately"
    refused(*argv, data / "v0.tif", again, "--stacks", pattern=same)
    argv = ["finetune", "--model", "vit_tiny", "--masks", "instances", "--stacks", "--data"]
    (tmp_path / "coco/images").mkdir(parents=True)
    (tmp_path / "coco/all.json").write_text('{"images": [], "annotations": [], "categories": []}')
    refused(*argv, tmp_path / "coco", pattern="stacks is on, but annotations in COCO's format name")


@pytest.mark.slow_on_cpu
def test_probabilities_of_single_objects_are_refused(tmp_path, refused):
    folder = train(tmp_path, "objects")
    argv = ["predict", "--adapter", folder / "run", folder / "data/images/v2.tif", "--box=1,1,9,9"]
    refused(*argv, "--probabilities", pattern="objects are prompted one by one; leave out --prob")
