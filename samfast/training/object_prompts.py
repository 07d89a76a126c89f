# SPDX-License-Identifier: Apache-2.0
"""Prompts of single objects for prediction: from the command line, or from a file of them.

A file is CSV, lines of image,x0,y0,x1,y1 (boxes) or image,x,y[,label[,object]] (points), with or
without a first line of names; or JSON, {image: [[x0, y0, x1, y1], …]} with the same numbers. Points
of an image that have one object's number belong together; a point without one is an object.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samfast.training.adapter_settings import PredictSettings
from samfast.training.boxes import check_box, parsed_box
from samfast.training.points import check_point, parsed_point
from samfast.training.stacks import Source

FORMS = {"box": "image,x0,y0,x1,y1", "point": "image,x,y[,label[,object]]"}
_MANY = {"box": "boxes", "point": "points"}
_WIDTHS = {"box": (4,), "point": (2, 3, 4)}


class ObjectPrompt(NamedTuple):
    """What one object is prompted by, in pixels of its image.

    box: float64 (4,) or None   points: float64 (P, 3), x, y, label; without a box at least one
    """

    box: np.ndarray | None
    points: np.ndarray


Prompts = dict[Source, list[ObjectPrompt]]


def named_prompts(settings: PredictSettings) -> list[str]:
    """Which options of prompts are given."""
    given = {
        "--box": settings.box,
        "--point": settings.point,
        "--boxes": settings.boxes,
        "--points": settings.points,
    }
    return [name for name, value in given.items() if value]


def object_prompts(
    settings: PredictSettings, kinds: tuple[str, ...], sizes: Mapping[Source, tuple[int, int]]
) -> Prompts:
    """The objects of each image, in the order of their prompts.

    kinds: what the adapter was trained with   sizes: (height, width) of each image
    Raises ValueError or FileNotFoundError for prompts that do not fit adapter, images or form.
    """
    named = named_prompts(settings)
    allowed = {f"--{name}" for kind in kinds for name in (kind, _MANY[kind])}
    for name in named:
        if name not in allowed:
            raise ValueError(
                f"adapter {settings.adapter} was trained with a {kinds[0]} for each object; leave "
                f"out {name}"
            )
    if len(named) != 1:
        ways = " or ".join(f"--{_MANY[kind]} FILE or --{kind}" for kind in kinds)
        said = "no prompt is given" if not named else f"{' and '.join(named)} are given"
        raise ValueError(
            f"adapter {settings.adapter} was trained with a prompt for each object, but {said}; "
            f"give {'one of ' if named else ''}{ways}"
        )
    if settings.boxes is not None:
        return _of_file(settings.boxes, "box", sizes)
    if settings.points is not None:
        return _of_file(settings.points, "point", sizes)
    found = [_of_box(parsed_box(text)) for text in settings.box]
    found += [_of_point(parsed_point(text)) for text in settings.point]
    return _spread(found, named[0].removeprefix("--"), sizes)


def _of_box(box: np.ndarray) -> ObjectPrompt:
    return ObjectPrompt(box, np.zeros((0, 3)))


def _of_point(point: np.ndarray) -> ObjectPrompt:
    return ObjectPrompt(None, point[None])


def _spread(
    given: list[ObjectPrompt], kind: str, sizes: Mapping[Source, tuple[int, int]]
) -> Prompts:
    """Give one image all prompts as its objects, several images one each or all the same one."""
    if len(sizes) == 1:
        found = {path: given for path in sizes}
    elif len(given) in (1, len(sizes)):
        own = given * len(sizes) if len(given) == 1 else given
        found = {path: [one] for path, one in zip(sizes, own, strict=True)}
    else:
        raise ValueError(
            f"got {len(given)} {_MANY[kind]} for {len(sizes)} images; give one for all, or one "
            f"for each, or a file of them with --{_MANY[kind]}"
        )
    for path, prompts in found.items():
        for prompt in prompts:
            _check(prompt, sizes[path], str(path))
    return found


def _check(prompt: ObjectPrompt, size: tuple[int, int], name: str) -> None:
    """Raise ValueError if a prompt is not inside its image of this (height, width)."""
    if prompt.box is not None:
        check_box(prompt.box, size, name)
    for point in prompt.points:
        check_point(point, size, name)


def _of_file(path: Path, kind: str, sizes: Mapping[Source, tuple[int, int]]) -> Prompts:
    """The objects of each image that a file names; none for an image that it does not name."""
    named = _by_name(sizes)
    groups: dict[Source, dict[Any, list[np.ndarray]]] = {image: {} for image in sizes}
    for where, name, numbers in _rows(path, kind):
        image = named.get(name)
        if image is None:
            known = "two images have that name" if name in named else "that image is not predicted"
            raise ValueError(f"{where} names the image {name!r}, but {known}")
        values = _numbers(where, kind, numbers)
        try:
            one = _of_box(values) if kind == "box" else _of_point(values[:3])
            _check(one, sizes[image], str(image))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        own = groups[image]
        joined = kind == "point" and len(values) == 4
        own.setdefault(("object", values[3]) if joined else len(own), []).append(values)
    found: Prompts = {}
    for image, objects in groups.items():
        rows = objects.values()
        if kind == "box":
            found[image] = [_of_box(values) for (values,) in rows]
        else:
            found[image] = [ObjectPrompt(None, np.stack([v[:3] for v in own])) for own in rows]
            for one in found[image]:
                if not one.points[:, 2].any():
                    x, y, _ = one.points[0]
                    raise ValueError(
                        f"the object of point {x:g},{y:g} of image {image} has no point with "
                        "label 1 (on the object); add one"
                    )
    return found


def _by_name(sizes: Mapping[Source, Any]) -> dict[str, Source | None]:
    """Images by their paths and by their file names; None for a name that two have."""
    found: dict[str, Source | None] = {}
    for path in sizes:
        found[path.name] = None if path.name in found else path
    return found | {str(path): path for path in sizes}


def _numbers(where: str, kind: str, given: list[Any]) -> np.ndarray:
    """float64 (4,) of a box, or x, y, label and object where it is told; ValueError for others."""
    form = FORMS[kind].removeprefix("image,")
    try:
        wrong = any(isinstance(value, bool) for value in given)
        values = np.array([float(value) for value in given])
    except (TypeError, ValueError, OverflowError):
        wrong, values = True, np.empty(0)
    if wrong or len(values) not in _WIDTHS[kind] or not np.isfinite(values).all():
        shown = ",".join(map(str, given))[:60]
        raise ValueError(f"{where} holds {shown!r}; expected numbers {form}")
    if kind == "box":
        if values[0] > values[2] or values[1] > values[3]:
            raise ValueError(
                f"{where} holds a box whose second corner is left of or above the first; expected "
                "x0 <= x1 and y0 <= y1"
            )
        return values
    values = np.append(values, 1.0) if len(values) == 2 else values
    if values[2] not in (0, 1):
        raise ValueError(f"{where} has label {values[2]:g}; it must be 1 (on the object) or 0")
    return values


def _rows(path: Path, kind: str) -> Iterator[tuple[str, str, list[Any]]]:
    """(place, image, numbers) of each prompt in a file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".json"):
        raise ValueError(f"{path} is neither a .csv nor a .json file; expected one of these")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None
    yield from (_json_rows if suffix == ".json" else _csv_rows)(path, text, kind)


def _csv_rows(path: Path, text: str, kind: str) -> Iterator[tuple[str, str, list[Any]]]:
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        for number, row in enumerate(reader):
            cells = [cell.strip() for cell in row]
            if not any(cells) or (number == 0 and cells[0].lower() == "image"):
                continue
            if len(cells) < 2:
                raise ValueError(
                    f"{path} line {reader.line_num} holds {row[0][:60]!r}, not {FORMS[kind]}"
                )
            yield f"{path} line {reader.line_num}", cells[0], cells[1:]
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} is not CSV: {error}") from None


def _json_rows(path: Path, text: str, kind: str) -> Iterator[tuple[str, str, list[Any]]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not JSON: {reason}") from None
    form = FORMS[kind].removeprefix("image,")
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a mapping of images, such as {{image: [[{form}], …]}}")
    for name, rows in found.items():
        if not isinstance(rows, list):
            raise ValueError(f"{path} has no list of [{form}] for image {name!r}")
        for number, row in enumerate(rows, 1):
            where = f"{path} image {name!r} row {number}"
            if not isinstance(row, list) or not all(isinstance(v, int | float) for v in row):
                raise ValueError(f"{where} holds {str(row)[:60]}; expected numbers [{form}]")
            yield where, name, row
