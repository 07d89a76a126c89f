# SPDX-License-Identifier: Apache-2.0
"""The files of several tasks: one item for each image, with the truth of every task that has it.

A task's folder lies beside ``images/`` and holds a file for some or all of these, or it has
``images/`` and ``masks/`` of its own. Each broken rule is one sentence, found before training.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from samfast.training.coco_items import (
    CocoMask,
    MaskSource,
    check_no_stacks,
    check_no_suffix,
    coco_parts,
    is_coco,
)
from samfast.training.file_pairs import MASK_SUFFIXES, STACK_SUFFIXES, Marked
from samfast.training.folders import (
    CheckedPair,
    Split,
    check_sizes,
    few_levels,
    files_by_stem,
    find_pairs,
    given_parts,
    listed,
    note_values,
    split_pairs,
    values_of,
    warn_of_blurred,
)
from samfast.training.foreground import among, binary_mask
from samfast.training.image_options import ImageOptions
from samfast.training.images import SUFFIXES, StoredMask, load_image, load_mask, read_values
from samfast.training.label_files import read_labels
from samfast.training.object_numbers import check_numbers
from samfast.training.split_checks import (
    check_foreground,
    few_levels_sentence,
    has_foreground,
    missing_sentence,
    missing_values,
)
from samfast.training.stacks import Source, check_as_many, file_of, image_slices, mask_slices
from samfast.training.tasks import UNLABELLED, TaskSpec

_ADVICE = (
    "say what is foreground: foreground: any (every value above 0), threshold: T (every value "
    "above T) or foreground: [VALUES] (only these)"
)
_AS_TAGGED = ImageOptions()
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


def read_stored(spec: TaskSpec, path: MaskSource) -> np.ndarray:
    """What a task's file stores: (H, W), of regression float32 (H, W, channels); of annotations
    the objects, -1 where nothing counts."""
    if isinstance(path, CocoMask):
        return path.labels()
    if spec.of_objects:
        return read_labels(path)
    if spec.kind == "regression" and not spec.labels:
        return read_values(path, spec.channels)
    return _load(spec, path).values


def _load(spec: TaskSpec, path: Source) -> StoredMask:
    return load_mask(path, spec.rule, also=spec.ignore, labels=spec.labels)


def is_ignored(spec: TaskSpec, stored: np.ndarray) -> np.ndarray:
    """Which stored values the task's ``ignore`` names."""
    return among(stored, spec.ignore)


def check_items(
    items: Sequence[Item],
    specs: Sequence[TaskSpec],
    options: ImageOptions = _AS_TAGGED,
    threads: int | None = None,
) -> list[dict[str, CheckedPair]]:
    """Decode every file and check sizes and values, or raise the first broken rule.

    Returns what each item holds of each task, by its name. threads: as in ``check_pairs``
    """
    seen: dict[str, dict[float, MaskSource]] = {spec.name: {} for spec in specs}
    found: list[dict[str, CheckedPair]] = []

    def checked(item: Item) -> dict[str, CheckedPair]:
        image = load_image(item.image, options)
        given = [spec for spec in specs if spec.name in item.targets]
        return {spec.name: _checked(spec, item, *image, options) for spec in given}

    def note(item: Item, own: dict[str, CheckedPair], exact: bool) -> None:
        for spec in specs:
            if spec.name in own and own[spec.name].exact == exact:
                _note(spec, item, own[spec.name], seen[spec.name])

    with ThreadPoolExecutor(threads) as pool:
        try:
            for item, own in zip(items, pool.map(checked, items), strict=True):
                found.append(own)
                note(item, own, exact=True)
        finally:
            pool.shutdown(cancel_futures=True)
    for item, own in zip(items, found, strict=True):
        note(item, own, exact=False)  # judged last, by what the other masks hold
    masks = [
        (item.targets[name], own[name])
        for item, own in zip(items, found, strict=True)
        for name in own
    ]
    warn_of_blurred([path for path, _ in masks], [checked for _, checked in masks])
    for spec in specs:
        _check_something(spec, seen[spec.name])
    return found


def _note(spec: TaskSpec, item: Item, own: CheckedPair, seen: dict[float, MaskSource]) -> None:
    """Add a mask's values to those of its task; raises ValueError if they have no obvious
    foreground."""
    path = item.targets[spec.name]
    binary = spec.kind == "binary" and not spec.labels
    if not binary:
        for value in own.values:
            seen.setdefault(value, path)
        return
    try:
        pair = Marked(item.stem, item.image, path)
        note_values(pair, own, seen, spec.rule is None, _ADVICE)
    except ValueError as error:
        raise ValueError(f"task {spec.name}: {error}") from None


def _checked(
    spec: TaskSpec,
    item: Item,
    image: np.ndarray,
    scaled: np.ndarray | None,
    options: ImageOptions,
) -> CheckedPair:
    """The values of a task's file that count, in order; only whether there are any, of measured
    ones. scaled: what the image was scaled from, None where it was not."""
    path = item.targets[spec.name]
    pair = Marked(item.stem, item.image, path)
    if isinstance(path, CocoMask):
        labels = path.labels()
        check_sizes(pair, image, labels)
        return CheckedPair([0.0, 1.0] if (labels > 0).any() else [0.0], False, True, None)
    if spec.kind == "regression" and not spec.labels:
        stored = read_values(path, spec.channels)
        check_sizes(pair, image, stored)
        counted = np.isfinite(stored) & ~is_ignored(spec, stored)
        return CheckedPair([0.0] if counted.any() else [], False, True, None)
    if spec.of_objects:
        labels = read_labels(path)
        check_sizes(pair, image, labels)
        check_numbers(path, labels)
        return CheckedPair([0.0, 1.0] if labels.any() else [0.0], False, True, None)
    mask = _load(spec, path)
    check_sizes(pair, image, mask.values)
    values = [value for value in values_of(mask.values) if value not in spec.ignore]
    if spec.labels:
        return CheckedPair(_classes(spec, path, values), False, True, None)
    few = None
    if scaled is not None and options.range == "auto":
        few = few_levels(image, scaled, binary_mask(mask.values, spec.rule))
    return CheckedPair(values, mask.lossy, mask.exact, few, mask.blurred)


def _classes(spec: TaskSpec, path: Source, values: list[float]) -> list[float]:
    """The classes among a mask's values; ValueError for a value that is none."""
    values = [value for value in values if value != UNLABELLED]
    most = spec.channels - 1 if spec.kind == "semantic" else None
    for value in values:
        if value < 0 or value != int(value) or (most is not None and value > most):
            wanted = f"0 to {most}" if most is not None else "whole numbers from 0 on"
            ignored = listed(sorted({*spec.ignore, UNLABELLED}))
            raise ValueError(
                f"mask {path} holds the value {value:g}, but the classes of task {spec.name} are "
                f"{wanted} (or {ignored}, which is ignored; see ignore:)"
            )
    return values


def remarks(
    spec: TaskSpec, items: Sequence[Item], found: Sequence[dict[str, CheckedPair]], count: int
) -> Iterator[str]:
    """What a run says of a task's files before it begins.

    found: of each item what ``check_items`` gives; the first ``count`` are for training. Raises
    ValueError where no mask for training has an object.
    """
    train, val = (
        [own[spec.name] for own in part if spec.name in own]
        for part in (found[:count], found[count:])
    )
    named: Sequence[float] = spec.rule if isinstance(spec.rule, tuple) else ()
    what = "foreground value"
    if spec.kind == "semantic":
        named, what = range(spec.channels), "class"
    elif spec.kind == "binary" and not spec.labels:
        check_foreground(train, spec.rule, "training", f" of task {spec.name}")
        own = [item for item in items if spec.name in item.targets]
        yield from few_levels_sentence(own, [*train, *val])
    missing = missing_values([p.values for p in train], [p.values for p in val], named)
    yield from missing_sentence(missing, f"task {spec.name}: {what}")


def _check_something(spec: TaskSpec, seen: dict[float, MaskSource]) -> None:
    if not seen:
        raise ValueError(f"no mask of task {spec.name} has a pixel that counts")
    if spec.kind != "binary" or spec.labels or has_foreground(seen, spec.rule):
        return
    if isinstance(spec.rule, tuple):
        raise ValueError(
            f"foreground {listed(spec.rule)} of task {spec.name} occurs in no mask; they "
            f"hold {listed(sorted(seen))}"
        )
    threshold = 0.0 if spec.rule is None else spec.rule.threshold
    raise ValueError(f"no mask of task {spec.name} has a foreground pixel (value > {threshold:g})")
