# SPDX-License-Identifier: Apache-2.0
"""Georeferences of TIFF files: what they say, and that label images keep them."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from samfast.training.georeference import Georeference, read_georeference
from samfast.training.images import read_image
from samfast.training.label_files import read_labels
from samfast.training.objects_out import write_labels

SCALE = (33550, "d", 3, (0.5, 0.25, 0.0), True)
TIE = (33922, "d", 6, (0.0, 0.0, 0.0, 400_000.25, 5_000_000.0, 0.0), True)
TEXT = (34737, "s", 0, "WGS 84 / UTM zone 32N|", True)
DOUBLES = (34736, "d", 2, (6378137.0, 298.257), True)


def keys(*entries):
    flat = [1, 1, 0, len(entries), *(number for entry in entries for number in entry)]
    return (34735, "H", len(flat), tuple(flat), True)


AREA, POINT, UTM, WGS84 = (1025, 0, 1, 1), (1025, 0, 1, 2), (3072, 0, 1, 32632), (2048, 0, 1, 4326)
OWN = (3072, 0, 1, 32767)


def write(path, *tags, **options):
    tifffile.imwrite(path, np.ones((4, 6, 3), np.uint8), extratags=tags, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}])
def test_scale_and_tie_point(tmp_path, options):
    tags = (SCALE, TIE, keys(AREA, UTM, (1026, 34737, 22, 0)), DOUBLES, TEXT)
    path = write(tmp_path / "a.tif", *tags, **options)
    found = read_georeference(path)
    assert found.affine == (0.5, 0.0, 400_000.25, 0.0, -0.25, 5_000_000.0)
    assert found.epsg == 32632
    assert read_image(path).shape == (4, 6, 3)  # as before
    for labels in (np.arange(24).reshape(4, 6), np.full((4, 6), 70_000)):
        write_labels(tmp_path / "labels.tif", labels, found)
        assert read_georeference(tmp_path / "labels.tif") == found
        np.testing.assert_array_equal(read_labels(tmp_path / "labels.tif"), labels)
        with tifffile.TiffFile(tmp_path / "labels.tif") as file:
            for tag in tags:
                assert file.pages[0].tags[tag[0]].value == tag[3]


def test_positions_of_centres_and_other_tie_points(tmp_path):
    tie = (33922, "d", 6, (2.0, 4.0, 0.0, 100.0, 200.0, 0.0), True)
    path = write(tmp_path / "a.tif", SCALE, tie, keys(POINT, WGS84))
    found = read_georeference(path)
    assert found.epsg == 4326
    a, b, c, d, e, f = found.affine
    centre = 2.5, 4.5  # of pixel (2, 4), which the tie point names
    assert a * centre[0] + b * centre[1] + c == 100
    assert d * centre[0] + e * centre[1] + f == 200


def test_a_matrix(tmp_path):
    matrix = [1.0, 2.0, 0.0, 3.0, 4.0, 5.0, 0.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    path = write(tmp_path / "a.tif", (34264, "d", 16, tuple(matrix), True), keys(AREA, OWN))
    assert read_georeference(path).affine == (1, 2, 3, 4, 5, 6)
    assert read_georeference(path).epsg is None


def test_many_tie_points_are_no_affine_map(tmp_path):
    path = write(tmp_path / "a.tif", (33922, "d", 12, tuple(map(float, range(12))), True))
    assert read_georeference(path).affine is None


def test_none(tmp_path):
    assert read_georeference(write(tmp_path / "a.tif")) is None
    Image.new("L", (3, 3)).save(tmp_path / "a.png")
    assert read_georeference(tmp_path / "a.png") is None
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_georeference(tmp_path / "b.tif")


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ([(33550, "d", 3, (0.0, 0.0, 0.0), True), TIE], "its affine map is singular"),
        ([(33550, "d", 3, (float("nan"), 1.0, 0.0), True), TIE], "its affine map is singular"),
        ([(33550, "d", 1, (1.0,), True), TIE], "scale has 1 number"),
        ([(34264, "d", 15, (1.0,) * 15, True)], "matrix has 15 numbers"),
        ([(34735, "H", 6, (1, 1, 0, 9, 1025, 0), True)], "directory of keys is truncated"),
        ([(34735, "I", 4, (1, 1, 70_000, 0), True)], "numbers that do not fit 16 bits"),
        ([(33550, "s", 0, "text", True)], "tag 33550 does not have GeoTIFF's type"),
        ([SCALE, (34737, "d", 1, (1.0,), True)], "tag 34737 does not have GeoTIFF's type"),
        ([SCALE, TIE, (274, "H", 1, 6, True)], "Orientation tag turns the image"),
    ],
)
def test_tags_that_make_no_sense(tmp_path, tags, words):
    path = write(tmp_path / "a.tif", *tags)
    with pytest.raises(ValueError, match=words) as caught:
        read_georeference(path)
    assert str(path) in str(caught.value)


def test_a_cut_file(tmp_path):
    path = write(tmp_path / "a.tif", SCALE, TIE, keys(AREA, UTM))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot be read: it ends before byte"):
        read_georeference(path)
    assert Georeference(None).tags == {}
