# SPDX-License-Identifier: Apache-2.0
"""A good data set in COCO's format, and broken ones made from it by seed."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = {1: (30, 40), 2: (25, 25), 7: (16, 50)}  # height, width
NAMES = {1: "a.png", 2: "sub/b.jpg", 7: "c.tif"}


def good_content() -> dict[str, Any]:
    """Polygons, one of two parts, run lengths as list and text, crowds, an image without any."""

    def one(own: int, image: int, shape: Any, category: int = 3, crowd: int = 0) -> dict:
        return {
            "id": own,
            "image_id": image,
            "category_id": category,
            "segmentation": shape,
            "iscrowd": crowd,
            "bbox": [1.0, 2.0, 3.0, 4.5],
            "area": 12,
        }

    return {
        "info": {"year": 2020},
        "images": [
            {"id": own, "file_name": NAMES[own], "height": size[0], "width": size[1]}
            for own, size in SIZES.items()
        ],
        "categories": [{"id": 3, "name": "cell"}, {"id": 5, "name": "nucleus"}],
        "annotations": [
            one(11, 1, [[2, 3, 20.5, 3, 20.5, 17.25, 2, 17.25]]),
            one(12, 1, [[1, 1, 9, 1, 9, 9], [30, 20, 38, 20, 38.5, 28]], category=5),
            one(13, 2, {"size": [25, 25], "counts": [100, 20, 5, 20, 480]}),
            one(14, 2, {"size": [25, 25], "counts": "T3d05N20R>"}),
            one(15, 1, {"size": [30, 40], "counts": [0, 90, 1110]}, crowd=1),
            one(16, 1, [[-3, -2.5, 6, -1, 6, 33, -1, 32]]),
        ],
    }


def write_good(folder: Path) -> Path:
    """The good data set in a new folder ``data``, and a canary beside it; returns the folder."""
    data = folder / "data"
    (data / "images" / "sub").mkdir(parents=True)
    (folder / "outside").mkdir()
    rng = np.random.default_rng(0)
    for own, name in NAMES.items():
        picture = rng.integers(0, 255, (*SIZES[own], 3)).astype(np.uint8)
        Image.fromarray(picture).save(data / "images" / name)
    shutil.copy(data / "images" / NAMES[1], folder / "outside" / "canary.png")
    (data / "all.json").write_text(json.dumps(good_content()))
    return data


class Case:
    """One data set that is about to be broken."""

    def __init__(self, folder: Path, seed: int):
        self.data = write_good(folder)
        self.outside = folder / "outside"
        self.json = self.data / "all.json"
        self.content = good_content()
        self.rng = np.random.default_rng(seed)

    def choose(self, of: list) -> Any:
        return of[int(self.rng.integers(len(of)))]

    def write(self) -> None:
        self.json.write_text(json.dumps(self.content))

    def annotation(self) -> dict:
        return self.choose(self.content["annotations"])

    def image(self) -> dict:
        return self.choose(self.content["images"])

    def image_path(self) -> Path:
        return self.data / "images" / self.choose(list(NAMES.values()))


def syntax(case: Case) -> None:
    """The text itself is damaged, or is JSON that no reader should take."""
    text = json.dumps(case.content)
    place = int(case.rng.integers(1, len(text)))
    number = text.index("2020")

    def numeral(value: str) -> str:
        return text[:number] + value + text[number + 4 :]

    made = {
        "cut": text[:place],
        "flip": text[:place] + chr(int(case.rng.integers(0, 0x250))) + text[place + 1 :],
        "nan": numeral("NaN"),
        "infinity": numeral("-Infinity"),
        "twice": text[:-1] + ', "images": []}',
        "deep": "[" * 200_000,
        "deeper": '{"a":' * 50_000 + "1" + "}" * 50_000,
        "digits": numeral("9" * 3_000_000),
        "exponent": numeral("1e999"),
        "empty": "",
        "space": " \n\t ",
        "null": "null",
        "list": "[]",
        "object": "{}",
        "quotes": text.replace('"', "'"),
        "comma": text[:-1] + ",}",
        "joined": text + text,
        "nul": text[:place] + "\0" + text[place:],
        "surrogate": text.replace("a.png", "\\ud800.png"),
    }
    coded = {"utf-16": "utf-16", "utf-32": "utf-32", "utf-8-sig": "utf-8-sig", "utf-16-be": ""}
    name = case.choose([*made, *coded, "latin", "noise", "gone", "pipe", "folder", "zero"])
    if name in made:
        case.json.write_bytes(made[name].encode())
    elif name in coded:
        case.json.write_bytes(text.encode(coded[name] or name))
    elif name == "latin":
        case.json.write_bytes(text.replace("cell", "z\xe9lle").encode("latin-1"))
    elif name == "noise":
        case.json.write_bytes(case.rng.bytes(2000))
    else:
        case.json.unlink()
        replace_by(name, case.json)


def replace_by(name: str, path: Path) -> None:
    """A thing of the file system where no file is any more."""
    if name == "pipe":
        os.mkfifo(path)
    elif name == "folder":
        path.mkdir()
    elif name == "zero":
        path.symlink_to("/dev/zero")
    elif name == "loop":
        path.symlink_to(path.name)


WRONG: list[Any] = [
    *(None, True, False, "", "1", "x" * 5000, -1, 0, 1.5, 1e300, 2**40, [], {}, [[]], [{}], [None]),
    *({"a": 1}, "\n", [1, 2, 3, 4], [[1, 2, 3, 4, 5, 6]], "\0", -0.0, [[[[[[[[1]]]]]]]]),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    keys = value if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    inner = [value[key] for key in keys]
    return found + [own for v in inner if isinstance(v, (dict, list)) for own in places(v)]


def types(case: Case) -> None:
    """Any value of the tree is gone, or of another type."""
    for _ in range(int(case.rng.integers(1, 3))):
        container, key = case.choose(places(case.content))
        if case.rng.random() < 0.25:
            del container[key]
        else:
            container[key] = copy.deepcopy(case.choose(WRONG))
    case.write()


def paths(case: Case) -> None:
    """file_name leads elsewhere."""
    images, canary = case.data / "images", case.outside / "canary.png"
    (images / "link.png").symlink_to(canary)
    (images / "way").symlink_to(case.outside)
    (images / "loop.png").symlink_to("loop.png")
    (images / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(images / "pipe.png")
    case.image()["file_name"] = case.choose(
        [
            *("../../outside/canary.png", str(canary), "sub/../../../outside/canary.png"),
            *("link.png", "way/canary.png", "loop.png", "zero.png", "pipe.png", "sub", ".", ".."),
            *("", "/", "/dev/zero", "C:\\a.png", "C:a.png", "sub\\b.jpg", "//host/a.png", "\0"),
            *("a.png\0.jpg", "x" * 300, "x/" * 3000, "a.png/", "a.png/x", "~/a.png", "missing.png"),
            *("../all.json", "./a.png", "sub//b.jpg", "\ud800", "a.png\n", "..", "sub/./../a.png"),
            *("../images/a.png", "file:///etc/passwd", "http://a.b/c.png", "\x7f", "%2e%2e/a.png"),
        ]
    )
    case.write()


def shapes(case: Case) -> None:
    """Polygons and run lengths that an annotation must not have."""
    bad_polygons = [
        *([], [[]], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 6, 7]]),
        *([1, 2, 3, 4, 5, 6], [[[1, 2], [3, 4], [5, 6]]], [[1, 2, 3, 4, 5, None]], [None]),
        *([[1, 2, 3, 4, 5, 1e300]], [[1, 2, 3, 4, 5, -1e9]], [[1e5, 2, 3, 4, 5, 6]], ["1,2"]),
        *([[1, 2, 3, 4, 5, True]], [["1", "2", "3", "4", "5", "6"]], [[0] * 6], [[-1e-300] * 8]),
        *([[2**31, 2, 3, 4, 5, 6]], [[2**62] * 6], [[1, 1, 9, 9, 9, 1], []], [[0, 0, 1, 1] * 9]),
        [[v for i in range(150_000) for v in (-40 + 119 * (i % 2), i % 25)]],
        [[2, 2, 2, 2, 2, 2]],
        [[5000, 0, 5000, 9, 5009, 9]],
    ]
    bad_counts = [
        *([], [0], [1], [-1, 1201], [1200], [625], [0, 625], [625, 1], [624], [2**31], [2**40]),
        *([2**32, 625], [2**63 - 1], [1.0, 624], [True, 624], ["625"], [None], [[625]], "", "0"),
        *("zzzz", "oooooooooooo", "\x00", "é", "P", "T3d05N20R", "T3d05N20R>T33", " " * 9, None),
        *(625, 1.5, {}, "0" * 5000, [0] * 5000 + [625], [-(2**31), 2**31 + 625], "1" * 99_999),
        [0, 1] * 700_000,
    ]
    one = case.annotation()
    if case.rng.random() < 0.45:
        one["segmentation"] = case.choose(bad_polygons)
    else:
        own = next(i for i in case.content["images"] if i["id"] == one["image_id"])
        size = case.choose([[25, 25], [own["height"], own["width"]]])
        one["segmentation"] = {"size": size, "counts": case.choose(bad_counts)}
    if case.rng.random() < 0.2:
        one["iscrowd"] = case.choose([0, 1, 2, -1, True, None, "1", 0.0])
    case.write()


def ids(case: Case) -> None:
    """Ids that are double, unknown, or none."""
    value = case.choose([None, True, False, 1, 2, 11, 3, 5, 99, -1, 1.0, "1", "", [1], {}, 2**62])
    record = case.choose([case.annotation(), case.image(), case.choose(case.content["categories"])])
    key = case.choose([key for key in ("id", "image_id", "category_id") if key in record])
    if case.rng.random() < 0.2:
        del record[key]
    else:
        record[key] = value
    case.write()


def sizes(case: Case) -> None:
    """Sizes of images and of run lengths that are not the file's."""
    value = case.choose(
        [
            0,
            -1,
            -40,
            1,
            2**15,
            2**16,
            2**31 - 1,
            2**31,
            2**32,
            2**62,
            1.5,
            40.0,
            True,
            None,
            "40",
            [],
        ]
    )
    if case.rng.random() < 0.5:
        image = case.image()
        keys = case.choose([["height"], ["width"], ["height", "width"]])
        image.update(dict.fromkeys(keys, value))
    else:
        one = case.choose(case.content["annotations"][2:5])
        size = case.choose([[value, 25], [25, value], [value, value], [25], [], [25, 25, 3], value])
        one["segmentation"]["size"] = size
        if case.rng.random() < 0.4 and isinstance(value, int):
            image = next(i for i in case.content["images"] if i["id"] == one["image_id"])
            image["height"] = image["width"] = value
            one["segmentation"] = {"size": [value, value], "counts": [value * value]}
    case.write()


def images(case: Case) -> None:
    """Files of images that are damaged, or no files."""
    path = case.image_path()
    data = path.read_bytes()
    name = case.choose(
        ["cut", "flip", "empty", "text", "gif", "size", "bomb", "link"] * 2
        + [*("gone", "pipe", "folder", "zero", "loop")]
    )
    path.unlink()
    place = int(case.rng.integers(0, len(data)))
    if name == "cut":
        path.write_bytes(data[:place])
    elif name == "flip":
        path.write_bytes(data[:place] + case.rng.bytes(8) + data[place + 8 :])
    elif name in ("empty", "text"):
        path.write_bytes(b"" if name == "empty" else b"no image at all")
    elif name in ("gif", "size"):
        picture = Image.new("RGB", (33, 22))
        picture.save(path, format="GIF" if name == "gif" else "PNG")
    elif name == "bomb":
        whole = (case.outside / "canary.png").read_bytes()
        path.write_bytes(whole[:16] + (2**20).to_bytes(4, "big") * 2 + whole[24:])
    elif name == "link":
        path.symlink_to(case.outside / "canary.png")
    else:
        replace_by(name, path)


KINDS: tuple[Callable[[Case], None], ...] = (syntax, types, paths, shapes, ids, sizes, images)


def mutate(folder: Path, seed: int) -> Path:
    """A broken data set in a new folder; returns its folder ``data``."""
    folder.mkdir()
    case = Case(folder, seed)
    KINDS[seed % len(KINDS)](case)
    return case.data
