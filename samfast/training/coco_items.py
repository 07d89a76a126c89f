# SPDX-License-Identifier: Apache-2.0
"""The images of a data folder in COCO's format as items of tasks, with their objects as truth."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from samfast.training.coco_folders import find_coco, images_folder
from samfast.training.coco_in import CocoImage, read_coco
from samfast.training.stacks import Source


@dataclass(frozen=True, eq=False)
class CocoMask:
    """The annotations of one image, used like a mask file."""

    annotations: Path
    image: CocoImage = field(repr=False)

    def __str__(self) -> str:
        return f"{self.annotations} of image {self.image.name}"

    @property
    def parent(self) -> Path:
        """Where the masks of all images are."""
        return self.annotations

    def labels(self) -> np.ndarray:
        """int32 (H, W): objects from 1 on, the smaller on top; -1 where only a crowd is, which
        counts nowhere."""
        labels, crowd = self.image.objects().labels(), self.image.crowd()
        return labels if crowd is None else np.where(crowd & (labels == 0), -1, labels)

    def digest(self) -> bytes:
        """Hash the annotations of the image."""
        said = (self.image.size, self.image.ids, self.image.shapes, self.image.crowds)
        return hashlib.blake2b(repr(said).encode()).digest()


MaskSource = Source | CocoMask  # what the truth of an image is read from


def is_coco(folder: Path) -> bool:
    """True if a data folder has annotations instead of mask folders."""
    if any((folder / part / "masks").is_dir() for part in ("", "train", "val")):
        return False
    try:
        return bool(find_coco(folder))
    except FileNotFoundError:
        return False


def check_no_annotations(folder: Path, mask_suffix: str | None) -> None:
    """Raise ValueError for annotations if the masks must not be objects."""
    if mask_suffix is None and folder.is_dir() and is_coco(folder):
        raise ValueError(
            f"{folder} has annotations in COCO's format and no masks/; train on their objects with "
            "--masks instances"
        )


def check_no_suffix(mask_suffix: str | None) -> None:
    """Raise ValueError for a mask suffix, since annotations name the images."""
    if mask_suffix is not None:
        raise ValueError(
            f"mask_suffix is {mask_suffix}, but annotations in COCO's format name their images; "
            "leave it out"
        )


def check_no_stacks(stacks: bool) -> None:
    """Raise ValueError for stacks, since annotations do not name slices."""
    if stacks:
        raise ValueError(
            "stacks is on, but annotations in COCO's format name files, not slices; leave out "
            "--stacks, or save masks as stacks of label images"
        )


def coco_parts(folder: Path) -> dict[str, list[tuple[Path, CocoMask]]]:
    """(image, its objects) of "train" and "val", or of "" where the folder is not split.

    Test images are left out if there are others. Raises ValueError for training images without
    validation images, or the reverse, and for an image listed twice.
    """
    found = find_coco(folder)
    if "test" in found and len(found) > 1:
        del found["test"]
    parts = {"" if name in ("all", "test") else name: path for name, path in found.items()}
    if "" not in parts and len(parts) == 1:
        name, path = next(iter(parts.items()))
        other = {"train": "val", "val": "train"}[name]
        raise FileNotFoundError(f"{folder} has {path} but no annotations for {other}")
    made = {}
    for name, path in parts.items():
        images = read_coco(path, images_folder(path))
        made[name] = [(image.path, CocoMask(path, image)) for image in images]
        known: dict[str, Path] = {}
        for image in images:
            first = known.setdefault(image.path.stem, image.path)
            if first is not image.path:
                raise ValueError(
                    f"{path} lists two images with the stem {image.path.stem}, {first} and "
                    f"{image.path}; rename or leave out one"
                )
    return made
