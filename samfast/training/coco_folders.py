# SPDX-License-Identifier: Apache-2.0
"""Find the files of a COCO data set: JSON, folders of images, single images."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from samfast.training.rle import shown

ROBOFLOW = "_annotations.coco.json"
_PARTS = {"train": "train", "valid": "val", "val": "val", "test": "test"}
_INSTANCES = re.compile(r"instances_(?P<name>(?P<part>.+?)(\d{4})?)\.json")


def find_coco(folder: Path | str) -> dict[str, Path]:
    """Find the JSON file of each part of a data folder: "train", "val", "test", or "all" for one
    file.

    Three layouts: ``train/``, ``valid/`` or ``val/``, ``test/``, each with
    ``_annotations.coco.json`` (Roboflow); ``annotations/instances_PART.json`` (COCO); one JSON file
    beside ``images/``. Raises ValueError if two layouts fit, FileNotFoundError if none does.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist or is not a folder")
    layouts = [found for found in (_roboflow(folder), _instances(folder), _single(folder)) if found]
    if not layouts:
        raise FileNotFoundError(
            f"{folder} has no annotations in COCO's format; expected train/{ROBOFLOW}, "
            "annotations/instances_train.json, or one JSON file next to images/"
        )
    if len(layouts) > 1:
        first, second = (next(iter(layout.values())) for layout in layouts[:2])
        raise ValueError(
            f"{folder} has annotations in two places, {first} and {second}; keep one of them"
        )
    return layouts[0]


def images_folder(annotations: Path | str) -> Path:
    """Return the folder of the images of a JSON file found by ``find_coco``."""
    path = Path(annotations)
    if path.name == ROBOFLOW:
        return path.parent
    matched = _INSTANCES.fullmatch(path.name)
    if path.parent.name != "annotations" or matched is None:
        return _existing(path, [path.parent / "images"])
    root, names = path.parent.parent, dict.fromkeys((matched["name"], matched["part"]))
    places = [base / name for base in (root / "images", root) for name in names]
    return _existing(path, [*places, root / "images"])


def _existing(path: Path, places: list[Path]) -> Path:
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"expected the images of {path} in {' or '.join(map(str, places))}, found no such folder"
    )


def _roboflow(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, part in _PARTS.items():
        path = folder / name / ROBOFLOW
        if not path.exists():
            continue
        if part in found:
            raise ValueError(f"{folder} has both {found[part]} and {path}; keep one of them")
        found[part] = path
    if not found and (folder / ROBOFLOW).exists():
        found["all"] = folder / ROBOFLOW
    return found


def _instances(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    place = folder / "annotations"
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        matched = _INSTANCES.fullmatch(path.name)
        if matched is None:
            continue
        part = _PARTS.get(matched["part"], "all")
        if part in found:
            raise ValueError(f"{place} has both {found[part].name} and {path.name}; keep one")
        found[part] = path
    if "all" in found and len(found) > 1:
        other = next(path.name for part, path in found.items() if part != "all")
        raise ValueError(
            f"{place} has {found['all'].name} beside {other}; name parts instances_train.json, "
            "instances_val.json and instances_test.json"
        )
    return found


def _single(folder: Path) -> dict[str, Path]:
    if not (folder / "images").is_dir():
        return {}
    files = [path for path in sorted(folder.glob("*.json")) if path.name != ROBOFLOW]
    if len(files) > 1:
        raise ValueError(
            f"{folder} holds {len(files)} JSON files next to images/, {files[0].name} and "
            f"{files[1].name} among them; keep the one with the annotations"
        )
    return {"all": files[0]} if files else {}


def image_file(folder: Path, name: Any) -> Path:
    """Return the file of an image that a JSON file names; it must be inside the folder.

    Nothing is opened. Raises ValueError, a phrase that follows the image's name, or
    FileNotFoundError.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"has the file_name {shown(name)}; expected text such as 12.jpg")
    windows = PureWindowsPath(name)
    plain = "\\" not in name and not any(c < " " or "\ud800" <= c <= "\udfff" for c in name)
    outside = ".." in PurePosixPath(name).parts or name.startswith("/")
    if not plain or outside or windows.drive or PurePosixPath(name) == PurePosixPath("."):
        raise ValueError(
            f"has the file_name {shown(name)}; expected a path within the folder of images, with / "
            "between folders and without .."
        )
    try:
        root, path = folder.resolve(strict=True), (folder / name).resolve(strict=True)
        inside, regular = path.is_relative_to(root), path.is_file()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"has the file_name {shown(name)}, which is not in {folder}; put it there"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its path cannot be followed"
        raise ValueError(
            f"has the file_name {shown(name)}, which cannot be opened ({reason}); rename the image"
        ) from None
    if not inside:
        raise ValueError(
            f"has the file_name {shown(name)}, a link that leaves the folder; copy the image there"
        )
    if not regular:
        raise ValueError(
            f"has the file_name {shown(name)}, which is not a regular file; put the image there"
        )
    return folder / name
