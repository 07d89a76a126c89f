# SPDX-License-Identifier: Apache-2.0
"""Tiles: places, weights, and maps that are those of each tile where nothing overlaps."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from samfast import cli
from samfast.training.predict_tiles import predicted_by_tiles
from samfast.training.tasks import TaskSpec
from samfast.training.tiles import blended, chosen_tiles, count_of, ramps, starts


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "expected"),
    [
        (50, 64, 16, [0]),
        (64, 64, 16, [0]),
        (65, 64, 16, [0, 1]),
        (112, 64, 16, [0, 48]),
        (113, 64, 16, [0, 24, 49]),
        (192, 64, 0, [0, 64, 128]),
    ],
)
def test_tiles_cover_an_axis_and_overlap_enough(length, tile, overlap, expected):
    assert starts(length, tile, overlap) == expected
    for before, after in itertools.pairwise(expected):
        assert before + tile - after >= overlap
    assert max(expected) + tile >= length
    assert count_of((length, 50), tile, overlap) == len(expected)


@pytest.mark.parametrize("overlap", [0, 1, 10, 16])
def test_weights_of_two_tiles_sum_to_one(overlap):
    begins = starts(200, 64, overlap)
    total = np.zeros(200)
    for begin, weight in zip(begins, ramps(begins, 64), strict=True):
        assert weight.min() > 0
        total[begin : begin + 64] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (30, 30), (91, 77)])
def test_a_blend_of_one_map_is_that_map(size):
    """Strips come from top to bottom and hold each line once, whatever the tiles are."""
    image = np.random.default_rng(0).normal(size=(2, *size)).astype(np.float32)

    def maps_of(line):
        assert len({tile.top for tile in line}) == 1
        for tile in line:
            yield image[:, tile.top : tile.bottom, tile.left : tile.right]

    strips = list(blended(size, 32, 9, maps_of))
    np.testing.assert_allclose(np.concatenate(strips, 1), image, atol=1e-5)
    assert all(strip.shape[1] <= 32 for strip in strips)


class Pointwise(torch.nn.Module):
    """In place of a model: what it says of a pixel is of that pixel alone."""

    def __init__(self, specs):
        super().__init__()
        self.sam = torch.nn.Conv2d(1, 1, 1)  # its parameters say the device
        self.sam.pixel_mean = torch.zeros(3, 1, 1)
        self.sam.image_encoder = torch.nn.Module()
        self.sam.image_encoder.img_size = 64
        self.specs = specs

    def forward(self, images, sizes, rows=None):
        grey = images.float().mean(1) - 100
        if rows is None:
            return grey, grey > 0
        return {spec.name: grey[:, None].repeat(1, spec.channels, 1, 1) for spec in self.specs}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("specs", [(), (TaskSpec("a", "semantic", 3), TaskSpec("b"))], ids=len)
def test_tiles_of_a_model_are_the_image(specs, batch_size):
    """Each tile is as large as the model's images, so that nothing is resized."""
    image = np.random.default_rng(1).integers(0, 255, (150, 200, 1), np.uint8).repeat(3, 2)
    told = []
    found = predicted_by_tiles(Pointwise(specs), image, specs, 64, 16, batch_size, told.append)
    assert sum(told) == count_of((150, 200), 64, 16) and max(told) <= batch_size
    mask = image[..., 0] > 100
    if not specs:
        np.testing.assert_array_equal(found[""], mask)
    else:
        np.testing.assert_array_equal(found["b"], mask)
        assert found["a"].shape == mask.shape and not found["a"].any()


def test_overlaps_that_cannot_be():
    assert chosen_tiles(None, None) is None and chosen_tiles(100, None) == (100, 25)
    for given in ((None, 4), (64, 33)):
        with pytest.raises(ValueError, match="overlap is"):
            chosen_tiles(*given)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of one epoch, whose masks are near nothing, but which depends on all of a tile."""
    folder = tmp_path_factory.mktemp("tiles")
    draw = np.random.default_rng(3)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(3):
        mask = np.zeros((64, 64), np.uint8)
        mask[20:45, 10 + 5 * i : 40 + 5 * i] = 255
        noise = draw.integers(0, 60, mask.shape)
        Image.fromarray((mask // 2 + noise).astype(np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
    options = ["--model", "vit_tiny", "--image-size", 64, "--epochs", 1, "--repeats", 4]
    argv = ["finetune", "--data", folder, *options, "--lr", 3e-3, "--output", folder / "run"]
    assert cli.main([str(word) for word in argv]) == 0
    return folder


def test_a_mosaic_in_tiles_is_its_images_where_none_overlap(adapter, tmp_path, capsys):
    images = [np.asarray(Image.open(adapter / f"images/{i}.png")) for i in (0, 1, 2, 0)]
    mosaic = np.block([[images[0], images[1]], [images[2], images[3]]])
    Image.fromarray(mosaic).save(tmp_path / "mosaic.png")
    argv = ["predict", "--adapter", adapter / "run", "--json"]

    def predicted(image, *options):
        words = [*argv, image, "--output", tmp_path / "out", *options]
        assert cli.main([str(word) for word in words]) == 0
        return json.loads(capsys.readouterr().out)["images"][0]

    capsys.readouterr()
    whole = [
        np.asarray(Image.open(predicted(adapter / f"images/{i}.png")["mask"])) for i in range(3)
    ]
    made = predicted(tmp_path / "mosaic.png", "--tile", 64, "--overlap", 0, "--instances")
    expected = np.block([[whole[0], whole[1]], [whole[2], whole[0]]])
    np.testing.assert_array_equal(np.asarray(Image.open(made["mask"])), expected)
    labels = np.asarray(Image.open(made["labels"]))
    np.testing.assert_array_equal(labels > 0, expected > 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--overlap", "4"], "overlap is 4, but only tiles overlap; give --tile"),
        (["--tile", "64", "--overlap", "40"], "of tiles of 64 it is at most 32"),
        (["--min-size", "4"], "min_size is 4, but no objects are numbered; give --instances"),
        (["--tile", "8"], "tile is 8; it must be at least 16"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(adapter, options, sentence, tmp_path, capsys):
    words = ["predict", adapter / "images/0.png", "--adapter", adapter / "run", *options]
    assert cli.main([str(word) for word in [*words, "--output", tmp_path / "o"]]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "o").exists()
