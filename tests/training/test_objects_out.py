# SPDX-License-Identifier: Apache-2.0
"""Objects written as label TIFF, COCO's JSON, GeoJSON and CSV, and read again by others."""

import contextlib
import csv
import io
import json
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_objects import blobs, rle_of
from test_outlines import area, inside

from samfast.training import label_tiff
from samfast.training.coco_in import read_coco
from samfast.training.georeference import Georeference
from samfast.training.label_files import read_labels
from samfast.training.objects import Objects
from samfast.training.objects_out import (
    ImageObjects,
    coco_json,
    csv_text,
    geojson,
    write_labels,
)


def objects_of(masks) -> Objects:
    return Objects.from_rles(masks[0].shape, [rle_of(mask, text=False) for mask in masks])


def ring_and_parts() -> list[np.ndarray]:
    """A mask with two holes, and one of two parts, to which a pixel comes that meets a corner."""
    ring, parts = np.zeros((2, 20, 30), bool)
    ring[2:12, 3:15] = True
    ring[4:7, 5:9] = ring[8:10, 7:13] = False
    parts[0:4, 20:30] = parts[10:20, 17:20] = parts[4, 19] = True
    return [ring, parts]


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (300, 517)])
@pytest.mark.parametrize(("top", "dtype"), [(65535, "u2"), (65536, "u4"), (2**32 - 1, "u4")])
def test_labels_come_back(tmp_path, monkeypatch, shape, top, dtype):
    monkeypatch.setattr(label_tiff, "_STRIP", 1 << 14)  # several strips
    labels = np.random.default_rng(1).integers(0, top, shape, endpoint=True)
    labels[0, 0] = top
    labels = labels.astype(dtype)
    path = tmp_path / "labels.tif"
    write_labels(path, labels)
    np.testing.assert_array_equal(read_labels(path), labels)
    with tifffile.TiffFile(path) as file:
        assert len(file.pages) == 1
        page = file.pages[0]
        assert (page.dtype, page.compression.name) == (np.dtype(dtype), "ADOBE_DEFLATE")
        np.testing.assert_array_equal(page.asarray(), labels)
        assert len(page.dataoffsets) > 1 or shape[0] < 100
        file.filehandle.seek(page.dataoffsets[0])
        strip = zlib.decompress(file.filehandle.read(page.databytecounts[0]))
        assert len(strip) == min(page.rowsperstrip, shape[0]) * shape[1] * labels.itemsize
    if dtype == "u2":
        np.testing.assert_array_equal(np.asarray(Image.open(path)), labels)
    assert [p.name for p in tmp_path.iterdir()] == ["labels.tif"]


def test_labels_of_objects(tmp_path):
    labels = objects_of(blobs(3)).labels()
    write_labels(tmp_path / "labels.tif", labels)
    again = Objects.from_labels(read_labels(tmp_path / "labels.tif"))
    np.testing.assert_array_equal(again.labels(), labels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((2, 2)), "float64"),
        (np.zeros((2, 2), bool), "bool"),
        (np.zeros((2, 2, 2), int), "shape"),
        (np.zeros((0, 2), int), "shape"),
        (np.array([[-1]]), "hold -1"),
        (np.array([[2**32]]), "hold 4294967296"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, words):
    with pytest.raises(ValueError, match=words) as caught:
        write_labels(tmp_path / "labels.tif", labels)
    assert "labels.tif" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_labels_too_large_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(label_tiff, "_MOST", 100)
    with pytest.raises(ValueError, match=r"labels.tif takes \d+ bytes.*cut the image"):
        write_labels(tmp_path / "labels.tif", np.arange(900).reshape(30, 30))
    assert not list(tmp_path.iterdir())


def test_coco_reads_it(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    sets = [blobs(1), ring_and_parts(), blobs(2, 9, 41, 3)]
    entries = [
        ImageObjects(
            "a.png", objects_of(sets[0]), [0.5 + i / 64 for i in range(6)], list("abcabc")
        ),
        ImageObjects("b.png", objects_of(sets[1])),
        ImageObjects("c.png", Objects.from_labels(np.zeros((5, 6), int)), [], []),
        ImageObjects("d.png", objects_of(sets[2]), classes=list("bbb")),
    ]
    path = tmp_path / "all.json"
    path.write_text(coco_json(entries))
    with contextlib.redirect_stdout(io.StringIO()):
        read = coco.COCO(str(path))
    assert [read.cats[i]["name"] for i in sorted(read.cats)] == ["a", "b", "c", "object"]
    masks = [mask for own in sets for mask in own]
    assert sorted(read.anns) == list(range(1, len(masks) + 1))
    for i, mask in enumerate(masks, 1):
        own = read.anns[i]
        np.testing.assert_array_equal(read.annToMask(own) == 1, mask)
        assert own["area"] == mask.sum()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert own["bbox"] == [
            *(columns[0], rows[0]),
            *(columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1),
        ]
    assert [read.anns[i].get("score") for i in (1, 6, 7)] == [0.5, 0.5 + 5 / 64, None]
    names = [read.cats[read.anns[i]["category_id"]]["name"] for i in (2, 7, 9)]
    assert names == ["b", "object", "b"]
    (tmp_path / "images").mkdir()
    for entry in entries:
        size = entry.objects.size
        Image.new("L", size[::-1]).save(tmp_path / "images" / entry.name)
    for entry, image in zip(entries, read_coco(path, tmp_path / "images"), strict=True):
        np.testing.assert_array_equal(image.objects().labels(), entry.objects.labels())
        assert list(image.categories) == list(entry.classes or ["object"] * len(entry.objects))


def test_categories_in_a_given_order():
    entry = ImageObjects("a.png", objects_of(blobs(1)), classes=list("bbbabb"))
    content = json.loads(coco_json([entry], ["b", "none", "a"]))
    assert [c["name"] for c in content["categories"]] == ["b", "none", "a"]
    assert [a["category_id"] for a in content["annotations"]] == [1, 1, 1, 3, 1, 1]
    with pytest.raises(ValueError, match="a is missing"):
        coco_json([entry], ["b"])
    with pytest.raises(ValueError, match="name each only once"):
        coco_json([entry], ["b", "a", "b"])
    with pytest.raises(ValueError, match=r"two images are called a\.png"):
        coco_json([entry, entry])


def rings_of(geometry) -> list:
    """The rings of each part, corners as tuples."""
    parts = geometry["coordinates"]
    parts = [parts] if geometry["type"] == "Polygon" else parts
    return [[[tuple(corner) for corner in ring] for ring in part] for part in parts]


@pytest.mark.parametrize("seed", range(4))
def test_geojson_holds_the_same_pixels(seed):
    masks = blobs(seed) + [np.pad(mask, ((0, 3), (0, 1))) for mask in ring_and_parts()]
    names = [f"class {i % 2}" for i in range(len(masks))]
    scores = np.linspace(0, 1, len(masks), dtype=np.float32)
    content = json.loads(geojson(objects_of(masks), scores, names, kind="detection"))
    assert content["type"] == "FeatureCollection" and "crs" not in content
    assert len(content["features"]) == len(masks)
    for i, (feature, mask) in enumerate(zip(content["features"], masks, strict=True)):
        parts = rings_of(feature["geometry"])
        rings = [ring for part in parts for ring in part]
        np.testing.assert_array_equal(inside(rings, mask.shape), mask)
        assert sum(map(area, rings)) == mask.sum()
        assert all(ring[0] == ring[-1] for ring in rings)
        assert feature["type"] == "Feature"
        assert feature["properties"] == {
            "objectType": "detection",
            "classification": {"name": names[i]},
            "measurements": {"score": float(scores[i])},
        }
    ring, parts = (feature["geometry"] for feature in content["features"][-2:])
    assert (ring["type"], len(ring["coordinates"])) == ("Polygon", 3)
    assert (parts["type"], len(parts["coordinates"])) == ("MultiPolygon", 3)


def test_geojson_without_scores_and_classes():
    content = json.loads(geojson(objects_of(ring_and_parts())))
    properties = [feature["properties"] for feature in content["features"]]
    assert properties == [{"objectType": "annotation"}] * 2
    assert json.loads(geojson(Objects.from_labels(np.zeros((2, 2), int))))["features"] == []


@pytest.mark.parametrize("affine", [(0.5, 0, 4e5, 0, -0.5, 5e6), (2.0, 0.5, -7, 0.25, 3.0, 1)])
def test_geojson_in_units_of_a_georeference(affine):
    masks = ring_and_parts()
    plain = json.loads(geojson(objects_of(masks)))
    content = json.loads(geojson(objects_of(masks), georeference=Georeference(affine, epsg=32632)))
    assert content["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32632"
    a, b, c, d, e, f = affine
    size = abs(a * e - b * d)
    for feature, before, mask in zip(content["features"], plain["features"], masks, strict=True):
        rings = [ring for part in rings_of(feature["geometry"]) for ring in part]
        areas = [area(ring) for ring in rings]
        assert sum(areas) == pytest.approx(mask.sum() * size)
        assert areas[0] > 0  # against the clock where y points up
        expected = {
            (a * x + b * y + c, d * x + e * y + f)
            for part in rings_of(before["geometry"])
            for ring in part
            for x, y in ring
        }
        assert {corner for ring in rings for corner in ring} == expected


def test_csv():
    masks = ring_and_parts()
    text = csv_text(objects_of(masks), [0.1, 1 / 3], ["a, b", "ü"])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 2
    for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        y, x = np.nonzero(mask)
        assert [int(row[key]) for key in ("id", "area")] == [i + 1, mask.sum()]
        assert [int(row[key]) for key in ("x0", "y0", "x1", "y1")] == [
            *(x.min(), y.min()),
            *(x.max(), y.max()),
        ]
        assert float(row["centroid_x"]) == pytest.approx(x.mean(), abs=6e-4)
        assert float(row["centroid_y"]) == pytest.approx(y.mean(), abs=6e-4)
    assert [float(row["score"]) for row in rows] == [0.1, 1 / 3]
    assert [row["name"] for row in rows] == ["a, b", "ü"]
    plain = csv_text(objects_of(masks)).splitlines()
    assert plain[0] == "id,area,x0,y0,x1,y1,centroid_x,centroid_y,score,name"
    assert all(line.endswith(",,") for line in plain[1:])


@pytest.mark.parametrize(
    ("scores", "classes", "words"),
    [
        ([1.0], None, "2 objects but 1 scores"),
        (None, ["a"] * 3, "2 objects but 3 classes"),
        ([1.0, float("nan")], None, "object 1 has the score nan"),
        ([float("inf"), 0], None, "object 0 has the score inf"),
        (None, ["a", 3], "object 1 has the class 3"),
        (None, ["", "a"], "object 0 has the class ''"),
    ],
)
@pytest.mark.parametrize(
    "write",
    [geojson, csv_text, lambda objects, *rest: coco_json([ImageObjects("a.png", objects, *rest)])],
)
def test_scores_and_classes_that_do_not_fit(write, scores, classes, words):
    with pytest.raises(ValueError, match=words):
        write(objects_of(ring_and_parts()), scores, classes)


def test_options_of_geojson_that_are_none():
    objects = objects_of(ring_and_parts())
    with pytest.raises(ValueError, match="kind is 'cell'; expected annotation or detection"):
        geojson(objects, kind="cell")
    with pytest.raises(ValueError, match="no affine map"):
        geojson(objects, georeference=Georeference(None))
