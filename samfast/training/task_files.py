# SPDX-License-Identifier: Apache-2.0
"""What the files of several tasks hold, checked before training; ``task_items`` finds them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from samfast.training.coco_items import CocoMask, MaskSource
from samfast.training.file_pairs import Marked
from samfast.training.folders import (
    CheckedPair,
    check_sizes,
    few_levels,
    listed,
    note_values,
    values_of,
    warn_of_blurred,
)
from samfast.training.foreground import among, binary_mask
from samfast.training.image_options import ImageOptions
from samfast.training.images import StoredMask, load_image, load_mask, read_values
from samfast.training.label_files import read_labels
from samfast.training.object_numbers import check_numbers
from samfast.training.split_checks import (
    check_foreground,
    few_levels_sentence,
    has_foreground,
    missing_sentence,
    missing_values,
)
from samfast.training.stacks import Source
from samfast.training.task_items import Item, find_items
from samfast.training.tasks import UNLABELLED, TaskSpec

__all__ = ["Item", "check_items", "find_items", "is_ignored", "read_stored", "remarks"]

_ADVICE = (
    "say what is foreground: foreground: any (every value above 0), threshold: T (every value "
    "above T) or foreground: [VALUES] (only these)"
)
_AS_TAGGED = ImageOptions()


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
