# SPDX-License-Identifier: Apache-2.0
"""The images of several tasks, found by the names of files: an item for each, and their split.

A task's folder lies beside ``images/`` and holds a file for some or all of these, or it has
``images/`` and ``masks/`` of its own. Each broken rule is one sentence; no image is decoded.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from samfast.training.coco_items import (
    CocoMask,
    MaskSource,
    check_no_stacks,
    check_no_suffix,
    coco_parts,
    is_coco,
)
from samfast.training.file_pairs import MASK_SUFFIXES, STACK_SUFFIXES
from samfast.training.folders import Split, files_by_stem, find_pairs, given_parts, split_pairs
from samfast.training.images import SUFFIXES
from samfast.training.stacks import Source, check_as_many, file_of, image_slices, mask_slices
from samfast.training.tasks import TaskSpec

VALUE_SUFFIXES = (*SUFFIXES, ".npy")


@dataclass(frozen=True)
class Item:
    """One image and the files with the truth of its tasks, by their names; or slices of files."""

    stem: str
    image: Source
    targets: dict[str, MaskSource] = field(hash=False)


Parts = dict[str, dict[Path, Item]]  # "train", "val" and, of what is not split, "": by image


def find_items(
    folder: Path | str,
    specs: Sequence[TaskSpec],
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    only_score: bool = False,
    mask_suffix: str | None = None,
    stacks: bool = False,
) -> Split[Item]:
    """Find the images of all tasks and split them; no image is decoded.

    What lies in train/ and val/ is split already. The rest is split by ``seed``, images that have
    the same tasks together, so that each task has its share; with ``only_score`` all the rest
    validates and nothing is trained. Raises ValueError or FileNotFoundError for an image without
    truth, truth without an image, and a task that has no image to train or none to validate.
    mask_suffix: as in ``find_pairs``, of tasks that share one folder of masks
    stacks: take each slice of a stack as an image; stacks are split, not their slices
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist or is not a folder")
    split = _find_files(folder, specs, val_fraction, seed, only_score, mask_suffix, stacks)
    if not stacks:
        return split
    return Split(_slice_items(split.train, specs), _slice_items(split.val, specs))


def _find_files(
    folder: Path,
    specs: Sequence[TaskSpec],
    val_fraction: float,
    seed: int,
    only_score: bool,
    mask_suffix: str | None,
    stacks: bool,
) -> Split[Item]:
    """``find_items``, of files whose stacks are whole."""
    if all(spec.of_objects for spec in specs) and is_coco(folder):
        check_no_suffix(mask_suffix)
        check_no_stacks(stacks)
        parts = _annotated(folder, specs)
    elif mask_suffix is not None:
        parts = _suffixed(folder, specs, mask_suffix, stacks)
    else:
        parts = _in_folders(folder, specs, only_score, stacks)
    split = _split(parts, val_fraction, seed, only_score, stacks)
    for spec in specs:
        for name, items in (("train", split.train), ("validate", split.val)):
            if only_score and name == "train":
                continue
            if not any(spec.name in item.targets for item in items):
                raise ValueError(f"task {spec.name} has no image to {name} in {folder}")
    return split


def _annotated(folder: Path, specs: Sequence[TaskSpec]) -> Parts:
    """The images that annotations in COCO's format list."""
    parts = _no_items()
    for part, masks in coco_parts(folder).items():
        for image, mask in masks:
            parts[part][image] = _item(image, specs, mask)
    return parts


def _suffixed(folder: Path, specs: Sequence[TaskSpec], suffix: str, stacks: bool) -> Parts:
    """The images of one folder of masks with a suffix, which all tasks share."""
    for spec in specs:
        if spec.folder != "masks":
            raise ValueError(
                f"mask_suffix is {suffix}, but masks of task {spec.name} are in {spec.folder}; "
                "leave it out"
            )
    parts = _no_items()
    for part in given_parts(folder) or ("",):
        for pair in find_pairs(folder / part, suffix, stacks):
            image = file_of(pair.image)
            parts[part][image] = _item(image, specs, pair.mask)
    return parts


def _in_folders(folder: Path, specs: Sequence[TaskSpec], only_score: bool, stacks: bool) -> Parts:
    """The images of the tasks' folders; with ``only_score``, some may have no truth."""
    parts = _no_items()
    shared: set[tuple[str, Path]] = set()
    for spec in specs:
        root, own = _root(folder, spec)
        for part in given_parts(root) or ("",):
            images = files_by_stem(root / part, "images", STACK_SUFFIXES if stacks else SUFFIXES)
            shared |= set() if own else {(part, path) for path in images.values()}
            for stem, path in _targets(root / part, spec, own, images).items():
                item = Item(stem, images[stem], {})
                parts[part].setdefault(images[stem], item).targets[spec.name] = path
    for part, path in sorted(shared):
        if path not in parts[part] and not only_score:
            raise ValueError(f"image {path} has no mask with the same stem in any task's folder")
    return parts


def _targets(place: Path, spec: TaskSpec, own: bool, images: Mapping[str, Path]) -> dict[str, Path]:
    """The files with a task's truth by stem, each of an image; of its own images, of each."""
    name = "masks" if own else spec.folder
    if not (place / name).is_dir():
        raise FileNotFoundError(f"task {spec.name} has no folder {place / name}")
    values = spec.kind == "regression" and not spec.labels
    targets = files_by_stem(place, name, VALUE_SUFFIXES if values else MASK_SUFFIXES)
    for stem, path in targets.items():
        if stem not in images:
            raise ValueError(
                f"{path} of task {spec.name} has no image with the same stem in {place / 'images'}"
            )
    for stem, image in images.items():
        if own and stem not in targets:
            raise ValueError(f"image {image} has no mask with the same stem in {place / name}")
    return targets


def _no_items() -> Parts:
    return {"train": {}, "val": {}, "": {}}


def _slice_items(items: Sequence[Item], specs: Sequence[TaskSpec]) -> tuple[Item, ...]:
    """``slice_pairs`` of items, all of whose files have as many slices."""
    channels = {
        spec.name: spec.channels if spec.kind == "regression" and not spec.labels else 1
        for spec in specs
    }
    found = []
    for item in items:
        images = image_slices(file_of(item.image))
        own: list[dict[str, MaskSource]] = [{} for _ in images]
        for name, path in item.targets.items():
            assert not isinstance(path, CocoMask), path  # see check_no_stacks
            masks = mask_slices(file_of(path), channels[name])
            check_as_many(item.image, path, len(images), len(masks))
            for targets, mask in zip(own, masks, strict=True):
                targets[name] = mask
        found += [
            Item(image.stem, image, targets) for image, targets in zip(images, own, strict=True)
        ]
    return tuple(found)


def _item(image: Path, specs: Sequence[TaskSpec], mask: MaskSource) -> Item:
    """An image with one mask for all tasks."""
    return Item(image.stem, image, {spec.name: mask for spec in specs})


def _root(folder: Path, spec: TaskSpec) -> tuple[Path, bool]:
    """The folder with the task's images, and whether these are its own."""
    own = folder / spec.folder
    if not Path(os.path.realpath(own)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"folder {own} of task {spec.name} lies outside the data folder")
    if any((own / name).is_dir() for name in ("images", "train", "val")):
        return own, True
    return folder, False


def _split(
    parts: Parts,
    val_fraction: float,
    seed: int,
    only_score: bool,
    stacks: bool,
) -> Split[Item]:
    def ordered(name: str) -> tuple[Item, ...]:
        return tuple(parts[name][path] for path in sorted(parts[name]))

    train, val, rest = map(ordered, ("train", "val", ""))
    if only_score:
        return Split((), val + rest)
    alike: dict[tuple[str, ...], list[Item]] = {}
    for item in rest:
        alike.setdefault(tuple(sorted(item.targets)), []).append(item)
    for items in alike.values():
        if len(items) == 1 and len(alike) > 1:
            train += tuple(items)
            continue
        own = split_pairs(items, val_fraction, seed, stacks)
        train, val = train + own.train, val + own.val
    return Split(train, val)
