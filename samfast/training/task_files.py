# SPDX-License-Identifier: Apache-2.0
"""The files of several tasks: one item for each image, with the truth of every task that has it.

A task's folder lies beside ``images/`` and holds a file for some or all of these, or it has
``images/`` and ``masks/`` of its own. Each broken rule is one sentence, found before training.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from samfast.training.folders import (
    Pair,
    Split,
    check_binary,
    check_sizes,
    files_by_stem,
    given_parts,
    listed,
    split_pairs,
    values_of,
)
from samfast.training.images import SUFFIXES, read_image, read_mask, read_values
from samfast.training.tasks import UNLABELLED, TaskSpec

VALUE_SUFFIXES = (*SUFFIXES, ".npy")


@dataclass(frozen=True)
class Item:
    """One image file and the files with the truth of its tasks, by their names."""

    stem: str
    image: Path
    targets: dict[str, Path] = field(hash=False)


def find_items(
    folder: Path | str,
    specs: Sequence[TaskSpec],
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    only_score: bool = False,
) -> Split:
    """Find the images of all tasks and split them; no file is opened.

    What lies in train/ and val/ is split already. The rest is split by ``seed``, images that have
    the same tasks together, so that each task has its share; with ``only_score`` all the rest
    validates and nothing is for training. Raises ValueError or FileNotFoundError for an image
    without truth, truth without an image, and a task that has no image to train or none to
    validate.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist or is no folder")
    parts: dict[str, dict[Path, Item]] = {"train": {}, "val": {}, "": {}}
    shared: set[tuple[str, Path]] = set()
    for spec in specs:
        root, own = _root(folder, spec)
        for part in given_parts(root) or ("",):
            place = root / part
            images = files_by_stem(place, "images")
            shared |= set() if own else {(part, path) for path in images.values()}
            suffixes = VALUE_SUFFIXES if spec.kind == "regression" and not spec.labels else SUFFIXES
            name = "masks" if own else spec.folder
            if not (place / name).is_dir():
                raise FileNotFoundError(f"task {spec.name} has no folder {place / name}")
            targets = files_by_stem(place, name, suffixes)
            for stem, path in targets.items():
                if stem not in images:
                    raise ValueError(
                        f"{path} of task {spec.name} has no image of the same stem in "
                        f"{place / 'images'}"
                    )
                item = Item(stem, images[stem], {})
                parts[part].setdefault(images[stem], item).targets[spec.name] = path
            if own and len(images) > len(targets):
                stem = next(stem for stem in images if stem not in targets)
                raise ValueError(
                    f"image {images[stem]} has no mask of the same stem in {place / name}"
                )
    for part, path in sorted(shared):
        if path not in parts[part] and not only_score:
            raise ValueError(f"image {path} has no mask of the same stem in any task's folder")
    split = _split(parts, val_fraction, seed, only_score)
    for spec in specs:
        for name, items in (("train", split.train), ("validate", split.val)):
            if only_score and name == "train":
                continue
            if not any(spec.name in item.targets for item in items):
                raise ValueError(f"task {spec.name} has no image to {name} in {folder}")
    return split


def _root(folder: Path, spec: TaskSpec) -> tuple[Path, bool]:
    """The folder with the task's images, and whether these are its own."""
    own = folder / spec.folder
    if not own.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"folder {own} of task {spec.name} lies outside the data folder")
    if any((own / name).is_dir() for name in ("images", "train", "val")):
        return own, True
    return folder, False


def _split(
    parts: dict[str, dict[Path, Item]], val_fraction: float, seed: int, only_score: bool
) -> Split:
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
        own = split_pairs(items, val_fraction, seed)
        train, val = train + own.train, val + own.val
    return Split(train, val)


def read_stored(spec: TaskSpec, path: Path) -> np.ndarray:
    """What a task's file stores: (H, W), of regression float32 (H, W, channels)."""
    if spec.kind == "regression" and not spec.labels:
        return read_values(path, spec.channels)
    return read_mask(path)


def is_ignored(spec: TaskSpec, stored: np.ndarray) -> np.ndarray:
    """Which stored values the task's ``ignore`` names, as floats of the file's precision."""
    ignore = np.asarray(spec.ignore)
    return np.isin(stored, ignore.astype(stored.dtype) if stored.dtype.kind == "f" else ignore)


def check_items(items: Sequence[Item], specs: Sequence[TaskSpec]) -> None:
    """Decode every file and check sizes and values, or raise the first broken rule."""
    seen: dict[str, dict[float, Path]] = {spec.name: {} for spec in specs}

    def values(item: Item) -> dict[str, list[float]]:
        image = read_image(item.image)
        return {
            spec.name: _checked_values(spec, item, image)
            for spec in specs
            if spec.name in item.targets
        }

    with ThreadPoolExecutor() as pool:
        try:
            for item, found in zip(items, pool.map(values, items), strict=True):
                for spec in specs:
                    path = item.targets.get(spec.name)
                    for value in found.get(spec.name, ()):
                        seen[spec.name].setdefault(value, path)
                    if path is not None and spec.kind == "binary" and not spec.labels:
                        if spec.foreground is None:
                            pair = Pair(item.stem, item.image, path)
                            _with_task(spec, check_binary, pair, found[spec.name], seen[spec.name])
        finally:
            pool.shutdown(cancel_futures=True)
    for spec in specs:
        _check_something(spec, seen[spec.name])


def _with_task(spec: TaskSpec, check, *arguments) -> None:
    """A check whose sentence advises an option of the command line, not tasks.yaml's key."""
    try:
        check(*arguments)
    except ValueError as error:
        sentence = str(error).replace("with --foreground (foreground=)", "with foreground:")
        raise ValueError(f"task {spec.name}: {sentence}") from None


def _checked_values(spec: TaskSpec, item: Item, image: np.ndarray) -> list[float]:
    """The values of a task's file that count, in order; only whether there are any, of measured
    ones."""
    path = item.targets[spec.name]
    stored = read_stored(spec, path)
    check_sizes(Pair(item.stem, item.image, path), image, stored)
    if spec.kind == "regression" and not spec.labels:
        counted = np.isfinite(stored) & ~is_ignored(spec, stored)
        return [0.0] if counted.any() else []
    values = [value for value in values_of(stored) if value not in spec.ignore]
    if not spec.labels:
        return values
    values = [value for value in values if value != UNLABELLED]
    most = spec.channels - 1 if spec.kind == "semantic" else None
    for value in values:
        if value < 0 or value != int(value) or (most is not None and value > most):
            wanted = f"0 to {most}" if most is not None else "whole numbers from 0 on"
            ignored = listed(sorted({*spec.ignore, UNLABELLED}))
            raise ValueError(
                f"mask {path} holds the value {value:g}, but the classes of task {spec.name} are "
                f"{wanted} (and {ignored}, which count nowhere; see ignore:)"
            )
    return values


def _check_something(spec: TaskSpec, seen: dict[float, Path]) -> None:
    if not seen:
        raise ValueError(f"no mask of task {spec.name} has a pixel that counts")
    if spec.kind != "binary" or spec.labels:
        return
    if spec.foreground is None and not any(value > 0 for value in seen):
        raise ValueError(f"no mask of task {spec.name} has a foreground pixel (value > 0)")
    if spec.foreground is not None and not set(spec.foreground) & set(seen):
        raise ValueError(
            f"foreground {listed(spec.foreground)} of task {spec.name} occurs in no mask; they "
            f"hold {listed(sorted(seen))}"
        )
