# SPDX-License-Identifier: Apache-2.0
"""Data sets in COCO's format, against pycocotools, and one sentence for each kind of damage."""

import contextlib
import io
import json
import os
import pickle
import sys

import numpy as np
import pytest
from coco_mutations import SIZES, good_content, write_good
from PIL import Image

from samfast.training.coco_folders import find_coco, images_folder
from samfast.training.coco_in import read_coco
from samfast.training.coco_shapes import checked_segmentation

coco = pytest.importorskip("pycocotools.coco")


@pytest.fixture
def data(tmp_path):
    return write_good(tmp_path)


def read(data, content=None, text=None):
    """The images of a data set, whose JSON is replaced before by a content or a text."""
    if content is not None or text is not None:
        text = json.dumps(content) if text is None else text
        (data / "all.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_coco(data / "all.json", data / "images")


def test_what_a_data_set_holds(data):
    images = read(data)
    assert [image.name for image in images] == ["a.png", "sub/b.jpg", "c.tif"]
    assert [image.size for image in images] == list(SIZES.values())
    assert [image.path for image in images] == [data / "images" / i.name for i in images]
    assert [image.ids for image in images] == [(11, 12, 16), (13, 14), ()]
    assert images[0].categories == ("cell", "nucleus", "cell")
    assert len(images[2].objects()) == 0
    assert images[1].crowd() is None and images[2].crowd() is None
    again = pickle.loads(pickle.dumps(images))  # workers get them so
    np.testing.assert_array_equal(again[0].objects().labels(), images[0].objects().labels())


def test_masks_are_those_of_pycocotools(data):
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = coco.COCO(str(data / "all.json"))
    for image in read(data):
        objects = image.objects()
        assert objects.empty == 0
        for i, own in enumerate(image.ids):
            np.testing.assert_array_equal(objects.mask(i), theirs.annToMask(theirs.anns[own]) == 1)
        if image.name == "a.png":
            expected = theirs.annToMask(theirs.anns[15]) == 1
            np.testing.assert_array_equal(image.crowd(), expected)
            assert 0 < expected.sum() == 90


def test_a_polygon_beyond_the_border_is_cut(data):
    """The same pixels as in a larger image, but for the rounding of its outline."""
    inside = good_content()
    polygon = [-7.5, 3, 12, -9, 52, 20.25, 12, 41]
    inside["annotations"] = [{**inside["annotations"][0], "segmentation": [polygon]}]
    cut = read(data, inside)[0].objects().mask(0)
    moved = [value + 40 for value in polygon]
    library = pytest.importorskip("pycocotools.mask")
    whole = library.decode(library.merge(library.frPyObjects([moved], 120, 120)))
    assert (cut != (whole[40:70, 40:80] == 1)).sum() <= 2
    assert 200 < cut.sum() < 1200


def test_objects_of_no_pixel_keep_categories_in_step(data):
    content = good_content()
    content["annotations"][0]["segmentation"] = [[-9, -9, -5, -9, -5, -5]]
    content["annotations"][1]["segmentation"] = {"size": [30, 40], "counts": [1200]}
    image = read(data, content)[0]
    objects = image.objects()
    assert (len(objects), objects.empty) == (1, 2)
    assert [image.categories[i] for i in objects.ids] == ["cell"]
    assert [image.ids[i] for i in objects.ids] == [16]


def test_a_mark_of_utf_8_is_no_damage(data):
    assert len(read(data, text=json.dumps(good_content()).encode("utf-8-sig"))) == 3


def test_a_link_within_the_folder_is_followed(data):
    (data / "images" / "a.png").rename(data / "images" / "sub" / "real.png")
    (data / "images" / "a.png").symlink_to("sub/real.png")
    assert read(data)[0].size == SIZES[1]


def test_links_and_pipes_are_not_opened(data):
    images = data / "images"
    (images / "a.png").unlink()
    (images / "a.png").symlink_to(data.parent / "outside" / "canary.png")
    with pytest.raises(ValueError, match=r"image 1 has the file_name 'a\.png', a link that leaves"):
        read(data)
    (images / "a.png").unlink()
    (images / "a.png").symlink_to("a.png")
    with pytest.raises(ValueError, match=r"image 1 .* cannot be opened"):
        read(data)
    (images / "a.png").unlink()
    os.mkfifo(images / "a.png")
    with pytest.raises(ValueError, match=r"image 1 .* is not a regular file"):
        read(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_cannot_hold(value):
    with pytest.raises(ValueError, match="not a finite number"):
        checked_segmentation([[1, 2, 3, 4, 5, value]], (10, 10))


def set_by(path: str, value: object):
    """A change of the good content: the value at a path such as images.0.id."""

    def change(content: dict) -> None:
        *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in way:
            content = content[key]
        content[last] = value

    return change


SEGMENTATION = "annotations.0.segmentation"
REFUSED = [
    ("images.0.height", 0, r"image 1 has the size \[0, 40\]"),
    ("images.0.height", -3, r"image 1 has the size \[-3, 40\]"),
    ("images.0.height", 2**31, r"image 1 has the size \[2147483648, 40\]"),
    ("images.0.height", True, r"image 1 has the size \[True, 40\]"),
    ("images.0.height", 31, "annotation 15 has an RLE of size"),
    ("images.2.height", 17, "image 7 is 50x17 .width x height. but .*c.tif is 50x16"),
    ("images.1.id", 1, "two images with the id 1"),
    ("images.1.id", "2", "has the id '2'; expected an integer"),
    ("images.1.file_name", "a.png", "image 2 has the file_name 'a.png', which image 1 also has"),
    ("images.1.file_name", "./a.png", "which image 1 also has"),
    ("images.1.file_name", "/a.png", "expected a path within the folder"),
    ("images.1.file_name", "../a.png", "expected a path within the folder"),
    ("images.1.file_name", "C:\\a.png", "expected a path within the folder"),
    ("images.1.file_name", "C:a.png", "expected a path within the folder"),
    ("images.1.file_name", "a\0.png", "expected a path within the folder"),
    ("images.1.file_name", 5, "has the file_name 5; expected text"),
    ("images.1.file_name", "none.png", "which is not in .*images; put it there"),
    ("images.1.file_name", "sub", "not a regular file"),
    ("images", [], "lists no image"),
    ("images", {}, "has images {}; expected a list"),
    ("annotations", None, "has annotations None; expected a list"),
    ("annotations.1.id", 11, "two annotations with the id 11"),
    ("annotations.1.image_id", 3, "annotation 12 has the image_id 3, which is not one of the 3"),
    ("annotations.1.image_id", True, "annotation 12 has the image_id True"),
    ("annotations.1.category_id", 4, "annotation 12 has the category_id 4"),
    ("annotations.1.iscrowd", 2, "annotation 12 has the iscrowd 2; expected 0 or 1"),
    ("annotations.1.bbox", [1, 2, 3], "annotation 12 has the bbox"),
    ("annotations.1.area", "large", "annotation 12 has the area 'large'"),
    ("categories.1.id", 3, "two categories with the id 3"),
    ("categories.1.name", " ", "category 5 has the name ' '"),
    (SEGMENTATION, [], "a box is not an outline; export polygons or RLE"),
    (SEGMENTATION, None, "a box is not an outline"),
    (SEGMENTATION, "text", "has the segmentation 'text'"),
    (SEGMENTATION, [1, 2, 3, 4, 5, 6], "segmentation part 1; expected a list"),
    (SEGMENTATION, [[1, 2, 3, 4]], "a polygon of 4 numbers"),
    (SEGMENTATION, [[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
    (SEGMENTATION, [[1, 2, 3, 4, 5, True]], "with True, which is not a finite number"),
    (SEGMENTATION, [[1, 2, 3, 4, 5, 1e300]], r"y = 1e\+300, far outside the image of 40x30"),
    (SEGMENTATION, [[80.5, 2, 3, 4, 5, 6]], "x = 80.5, far outside"),
    (SEGMENTATION, [[0, 0, 39, 29] * 60_000], "more than 5000000; simplify it"),
    (SEGMENTATION, {"size": [30, 40], "counts": [-1, 1201]}, "run length -1"),
    (SEGMENTATION, {"size": [30, 40], "counts": [1199]}, "add up to 1199"),
    (SEGMENTATION, {"size": [30, 40], "counts": "0"}, "add up to 0"),
    (SEGMENTATION, {"size": [40, 30], "counts": [1200]}, "RLE of size .40, 30. in an image of"),
]


@pytest.mark.parametrize(("path", "value", "words"), REFUSED)
def test_one_sentence_for_each(data, path, value, words):
    content = good_content()
    set_by(path, value)(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        read(data, content)
    sentence = str(caught.value)
    assert sentence.startswith(str(data / "all.json")) and "\n" not in sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("{", "is not JSON"),
        ("null", "holds None; expected an object"),
        ('{"images": [], "images": []}', "the key 'images' twice"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": 1e999}', "holds the number 1e999"),
        ('{"a": ' + "9" * 10**6 + "}", "of 1000000 digits"),
        ("[" * 10**6, "nests JSON too deeply"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b'{"a": "\xe9"}', "not in UTF-8 .byte 7."),
    ],
)
def test_json_that_is_none(data, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        read(data, text=text)
    assert len(str(caught.value)) < 400


def test_files_that_are_none(data):
    with pytest.raises(FileNotFoundError, match=r"folder of images .* does not exist"):
        read_coco(data / "all.json", data / "pictures")
    (data / "all.json").unlink()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(data)
    os.mkfifo(data / "all.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read(data)


def test_a_missing_library_is_one_sentence(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r'pip install "samfast\[data\]"'):
        read(data)
    content = good_content()
    content["annotations"] = content["annotations"][2:5]  # run lengths need no library
    assert [len(image.objects()) for image in read(data, content)] == [0, 2, 0]


def touch(*paths) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_layouts(tmp_path):
    roboflow, single, instances = (tmp_path / name for name in ("r", "s", "i"))
    touch(*(roboflow / part / "_annotations.coco.json" for part in ("train", "valid", "test")))
    found = find_coco(roboflow)
    assert {part: path.parent.name for part, path in found.items()} == {
        "train": "train",
        "val": "valid",
        "test": "test",
    }
    assert images_folder(found["val"]) == roboflow / "valid"
    touch(single / "labels.json")
    (single / "images").mkdir()
    assert find_coco(single) == {"all": single / "labels.json"}
    assert images_folder(single / "labels.json") == single / "images"
    names = "instances_train2017.json", "instances_val2017.json", "captions_val2017.json"
    touch(*(instances / "annotations" / name for name in names))
    found = find_coco(instances)
    assert {part: path.name for part, path in found.items()} == {
        "train": "instances_train2017.json",
        "val": "instances_val2017.json",
    }
    with pytest.raises(FileNotFoundError, match=r"expected the images of .* found no such folder"):
        images_folder(found["train"])
    for folder in ("images", "train2017", "images/train"):  # each nearer than the one before
        (instances / folder).mkdir()
        assert images_folder(found["train"]) == instances / folder


def test_one_file_of_instances(tmp_path):
    touch(tmp_path / "annotations" / "instances_default.json")
    (tmp_path / "images").mkdir()
    path = find_coco(tmp_path)["all"]
    assert images_folder(path) == tmp_path / "images"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.json", "b.json"], "2 JSON files next to images/, a.json and b.json"),
        (["train/_annotations.coco.json", "a.json"], "in two places"),
        (["valid/_annotations.coco.json", "val/_annotations.coco.json"], "has both"),
        (["annotations/instances_train.json", "annotations/instances_train2017.json"], "both"),
        (["annotations/instances_train.json", "annotations/instances_x.json"], "beside"),
        (["annotations/instances_x.json", "annotations/instances_y.json"], "has both"),
    ],
)
def test_layouts_that_may_mean_two_things(tmp_path, names, words):
    (tmp_path / "images").mkdir()
    touch(*(tmp_path / name for name in names))
    with pytest.raises(ValueError, match=words):
        find_coco(tmp_path)


def test_no_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no annotations in COCO's format"):
        find_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_coco(tmp_path / "none")


def test_an_image_that_is_turned_by_its_tags(data):
    """Sizes are those of the upright image, as it is trained on."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 16)).save(data / "images" / "c.tif", format="JPEG", exif=exif)
    with pytest.raises(ValueError, match=r"image 7 is 50x16 .* is 16x50, upright"):
        read(data)
