# SPDX-License-Identifier: Apache-2.0
"""Objects of a data set in COCO's format: every value is checked before any is used.

Raises ValueError, or FileNotFoundError, with one sentence that names the JSON file, what is wrong
in it, and what to do.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samfast.training.coco_folders import image_file
from samfast.training.coco_shapes import (
    Segmentation,
    checked_segmentation,
    is_number,
    mask_library,
    rle_of,
)
from samfast.training.image_files import read_samples
from samfast.training.json_files import read_json
from samfast.training.objects import Objects
from samfast.training.rle import check_size, is_whole, shown

_ADVICE = "export the annotations again"


@dataclass(frozen=True)
class CocoImage:
    """An image with the objects of its annotations.

    name: its file_name   size: (height, width)   ids: of the annotations of objects, without crowds
    categories: the name of each one's category
    """

    path: Path
    name: str
    size: tuple[int, int]
    ids: tuple[int, ...] = ()
    categories: tuple[str, ...] = ()
    shapes: tuple[Segmentation, ...] = ()
    crowds: tuple[Segmentation, ...] = ()

    def objects(self) -> Objects:
        """Return the objects in the annotations' order, without those that have no pixels.

        Object i has the category ``categories[objects.ids[i]]``.
        """
        return Objects.from_rles(self.size, [rle_of(shape, self.size) for shape in self.shapes])

    def crowd(self) -> np.ndarray | None:
        """Return the pixels of crowds (iscrowd), which are ignored: bool (H, W), or None without
        crowds."""
        if not self.crowds:
            return None
        rles = [rle_of(shape, self.size) for shape in self.crowds]
        return Objects.from_rles(self.size, rles).labels() > 0


def read_coco(annotations: Path | str, images: Path | str) -> list[CocoImage]:
    """Read the images of a COCO JSON file, in its order, with their objects.

    images: the folder of the files. Every image is decoded once and must have the size given in the
    JSON file. Raises ImportError if pycocotools is needed but not installed.
    """
    path, folder = Path(annotations), Path(images)
    content = read_json(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of images {folder} does not exist or is not a folder")
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {shown(content)}; expected an object with images, annotations and "
            f"categories; {_ADVICE}"
        )
    found = _images(path, content, folder)
    shapes = _annotations(path, content, found, _categories(path, content))
    _check_files(path, found)
    made = []
    for own, (name, file, size) in found.items():
        objects = [one for one in shapes[own] if not one.crowd]
        made.append(
            CocoImage(
                path=file,
                name=name,
                size=size,
                ids=tuple(one.id for one in objects),
                categories=tuple(one.category for one in objects),
                shapes=tuple(one.shape for one in objects),
                crowds=tuple(one.shape for one in shapes[own] if one.crowd),
            )
        )
    return made


_Image = tuple[str, Path, tuple[int, int]]  # file_name, file, (height, width)


@dataclass(frozen=True)
class _Annotation:
    id: int
    category: str
    shape: Segmentation
    crowd: bool


def _images(path: Path, content: dict[str, Any], folder: Path) -> dict[int, _Image]:
    """By id. No file is opened."""
    found: dict[int, _Image] = {}
    owners: dict[Path, int] = {}
    for own, record in _records(path, content, "images", "image"):
        with _about(f"{path}, image {own}"):
            sides = [record.get("height"), record.get("width")]
            if None in sides:
                raise ValueError(f"has no height or no width; {_ADVICE}")
            size = check_size(sides)
            file = image_file(folder, record.get("file_name"))
            other = owners.setdefault(file.resolve(), own)
            if other != own:
                raise ValueError(
                    f"has the file_name {shown(record['file_name'])}, which image {other} also "
                    "has; merge them"
                )
        found[own] = record["file_name"], file, size
    if not found:
        raise ValueError(f"{path} lists no images; {_ADVICE}")
    return found


def _categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    """Names by id."""
    names = {}
    for own, record in _records(path, content, "categories", "category"):
        name = record.get("name")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{path}, category {own} has the name {shown(name)}; expected text such as cell"
            )
        names[own] = name
    return names


def _annotations(
    path: Path, content: dict[str, Any], images: dict[int, _Image], categories: dict[int, str]
) -> dict[int, list[_Annotation]]:
    """By the id of the image."""
    found: dict[int, list[_Annotation]] = {own: [] for own in images}
    for own, record in _records(path, content, "annotations", "annotation"):
        with _about(f"{path}, annotation {own}"):
            image = _known(record, "image_id", "images", images)
            category = _known(record, "category_id", "categories", categories)
            crowd = record.get("iscrowd", 0)
            if not is_whole(crowd) or crowd not in (0, 1):
                raise ValueError(f"has the iscrowd {shown(crowd)}; expected 0 or 1")
            _check_extras(record)
            shape = checked_segmentation(record.get("segmentation"), images[image][2])
        if isinstance(shape, tuple):
            mask_library()  # say now that it is missing
        found[image].append(_Annotation(own, categories[category], shape, bool(crowd)))
    return found


def _check_extras(record: dict[str, Any]) -> None:
    """Check unused keys too: refuse an annotation if any part of it is damaged."""
    box, area = record.get("bbox", [0, 0, 0, 0]), record.get("area", 0)
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise ValueError(f"has the bbox {shown(box)}; expected four numbers x, y, width, height")
    if not is_number(area):
        raise ValueError(f"has the area {shown(area)}; expected a number of pixels")


def _known(record: dict[str, Any], key: str, what: str, known: dict[int, Any]) -> int:
    """The id of an image or a category that an annotation names."""
    if key not in record:
        raise ValueError(f"has no {key}; {_ADVICE}")
    value = record[key]
    if not is_whole(value) or value not in known:
        raise ValueError(
            f"has the {key} {shown(value)}, which is not one of the {len(known)} {what}; {_ADVICE}"
        )
    return value


def _records(
    path: Path, content: dict[str, Any], key: str, what: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(id, record) of each record of a list, whose ids are integers that differ."""
    records = content.get(key)
    if not isinstance(records, list):
        held = f"{key} {shown(records)}" if key in content else f"no {key}"
        raise ValueError(f"{path} has {held}; expected a list of {key}; {_ADVICE}")
    seen = set()
    for number, record in enumerate(records):
        where = f"{path}, {key}[{number}]"
        if not isinstance(record, dict):
            raise ValueError(f"{where} is {shown(record)}; expected an object; {_ADVICE}")
        if "id" not in record:
            raise ValueError(f"{where} has no id; {_ADVICE}")
        own = record["id"]
        if not is_whole(own):
            raise ValueError(f"{where} has the id {shown(own)}; expected an integer; {_ADVICE}")
        if own in seen:
            raise ValueError(
                f"{path} has two {key} with the id {own}; give each {what} an id of its own"
            )
        seen.add(own)
        yield own, record


def _check_files(path: Path, images: dict[int, _Image]) -> None:
    """Decode every image, and compare its size with the one that the JSON file says."""
    with ThreadPoolExecutor() as pool:
        try:
            sizes = pool.map(_stored_size, [file for _, file, _ in images.values()])
            for own, (_, file, (height, width)) in images.items():
                with _about(f"{path}, image {own}:"):
                    stored = next(sizes)
                if tuple(stored) != (height, width):
                    raise ValueError(
                        f"{path}, image {own} is {width}x{height} (width x height) but {file} is "
                        f"{stored[1]}x{stored[0]}, upright; annotate this file, or put the "
                        "annotated one there"
                    )
        finally:
            pool.shutdown(cancel_futures=True)


def _stored_size(file: Path) -> Sequence[int]:
    return read_samples(file, as_image=True).values.shape[:2]


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Prefix error phrases with their subject."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} {error}") from None
    except ValueError as error:
        raise ValueError(f"{what} {error}") from None
