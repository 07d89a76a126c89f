# SPDX-License-Identifier: Apache-2.0
"""Prompted objects of large images: to which tile a prompt goes, and what comes of it there."""

import json
from pathlib import Path

import numpy as np
import pytest
from objects_folder import fill_with_objects
from PIL import Image

from samfast import cli
from samfast.training.object_prompts import ObjectPrompt
from samfast.training.prompted_scores import LabelMap
from samfast.training.prompted_tiles import places_of
from samfast.training.tiles import Tile

IMAGE = Path("scene.png")


def box(*corners):
    return ObjectPrompt(np.array(corners, float), np.empty((0, 3)))


def points(*places):
    return ObjectPrompt(None, np.array([(x, y, 1) for x, y in places], float))


def place_of(prompt, tile=64, overlap=32, shape=(100, 300)):
    (found,) = places_of({IMAGE: [prompt]}, {IMAGE: shape}, tile, overlap)[IMAGE]
    return found


def test_a_prompt_goes_to_the_tile_in_whose_middle_it_lies():
    assert place_of(points((32, 32))) == Tile(0, 0, 64, 64)
    assert place_of(points((5, 5))) == Tile(0, 0, 64, 64)
    assert place_of(points((299, 99))) == Tile(36, 236, 100, 300)
    near = place_of(points((70, 40)))
    assert abs((near.left + near.right) / 2 - 70) <= 16
    assert place_of(box(5, 5, 60, 60)) == Tile(0, 0, 64, 64)


def test_a_prompt_that_no_tile_holds_has_one_of_its_own():
    own = place_of(box(20, 30, 80, 90))
    assert own == Tile(28, 18, 92, 82)
    assert place_of(box(0, 10, 64, 70), overlap=0) == Tile(8, 0, 72, 64)
    corner = place_of(box(237, 37, 299, 99), overlap=0, shape=(100, 300))
    assert (corner.right, corner.bottom) == (300, 100)


def test_prompts_of_one_tile_are_together():
    prompts = {IMAGE: [points((30, 30)), box(250, 60, 280, 90), points((40, 30), (20, 20))]}
    found = places_of(prompts, {IMAGE: (100, 300)}, 64, 32)[IMAGE]
    assert sorted(found.values()) == [[0, 2], [1]]


def test_a_prompt_larger_than_a_tile_is_refused():
    with pytest.raises(ValueError, match=r"object 2 of scene.png is 70x10 pixels, but a tile has"):
        places_of({IMAGE: [points((1, 1)), box(0, 0, 70, 10)]}, {IMAGE: (99, 99)}, 64, 32)


def test_a_mask_of_a_tile_is_put_in_its_place():
    found = LabelMap((6, 8))
    found.add(np.ones((6, 8), bool), 1)
    assert found.add(np.eye(2, dtype=bool), 2, Tile(3, 4, 5, 6)) == 2
    assert found.labels[3, 4] == found.labels[4, 5] == 2 and (found.labels == 2).sum() == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompted")
    data = fill_with_objects(folder / "data", 3)
    options = ["--model", "vit_tiny", "--image-size", 64, "--epochs", 1, "--repeats", 1]
    options += ["--masks", "instances", "--prompt", "mixed", "--overlays", 0]
    argv = ["finetune", "--data", data, *options, "--output", folder / "run"]
    assert cli.main([str(word) for word in argv]) == 0
    return folder


def test_objects_of_a_mosaic_are_those_of_its_images(run, tmp_path, capsys):
    """Tiles lie on the images of the mosaic, so that each sees what one image alone shows."""
    draw = np.random.default_rng(0)
    parts = [draw.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(2)]
    for name, image in (("0", parts[0]), ("1", parts[1]), ("both", np.hstack(parts))):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    corners = [(10, 12, 40, 50), (5, 30, 60, 44)]
    boxes = {"0.png": [corners[0]], "1.png": [corners[1]]}
    boxes["both.png"] = [corners[0], (5 + 64, 30, 60 + 64, 44)]

    def labels(name, *options):
        (tmp_path / "boxes.json").write_text(json.dumps({name: boxes[name]}))
        words = ["predict", tmp_path / name, "--adapter", run / "run", *options]
        words += ["--boxes", tmp_path / "boxes.json", "--output", tmp_path / "out"]
        assert cli.main([str(word) for word in words]) == 0
        return np.asarray(Image.open(tmp_path / "out" / f"{name[:-4]}_labels.tif"))

    alone = [labels(name) for name in ("0.png", "1.png")]
    together = labels("both.png", "--tile", 64, "--overlap", 0)
    np.testing.assert_array_equal(together, np.hstack([alone[0], 2 * alone[1]]))
    assert {0, 1, 2} >= set(np.unique(together)) and together.any()


def test_a_box_larger_than_a_tile_ends_before_anything_is_written(run, refused, tmp_path):
    Image.fromarray(np.zeros((80, 80, 3), np.uint8)).save(tmp_path / "a.png")
    words = ["predict", tmp_path / "a.png", "--adapter", run / "run", "--box", "0,0,79,60"]
    refused(*words, "--tile", 48, pattern="79x60 pixels, but a tile has 48; give a larger --tile")
