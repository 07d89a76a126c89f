# SPDX-License-Identifier: Apache-2.0
"""A folder of ``images/`` and ``masks/``: checking every file, splitting.

Each broken rule is one ValueError or FileNotFoundError, a sentence with the file and the values,
and all of them are found before training begins.
"""

import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from samfast.training.coco_items import MaskSource
from samfast.training.file_pairs import Marked, Pair, files_by_stem, find_pairs, slice_pairs
from samfast.training.foreground import (
    Above,
    Foreground,
    among,
    chosen_foreground,
    chosen_ignore,
    counted_mask,
)
from samfast.training.image_options import ImageOptions
from samfast.training.images import load_image, load_mask
from samfast.training.stacks import Source

__all__ = [
    "ADVICE",
    "CheckedPair",
    "Pair",
    "Split",
    "check_binary",
    "check_pairs",
    "check_sizes",
    "few_levels",
    "files_by_stem",
    "find_pairs",
    "find_scored",
    "find_split",
    "given_parts",
    "listed",
    "load_split",
    "note_values",
    "split_pairs",
    "values_of",
    "warn_of_blurred",
]

ADVICE = (
    "say what is foreground: --foreground any (every value above 0), --threshold T (every value "
    "above T) or --foreground VALUES (only these). --ignore VALUES excludes values. For other "
    "masks, use --masks classes --classes N, or --masks instances"
)
_AS_TAGGED = ImageOptions()
_SHOWN_VALUES = 5
_FEW_LEVELS = 8  # grey values in which nothing of an object can be told apart
_LOSSY_STEPS = 5  # by which a value differs from one lossy mask to the next
_ROUGHLY = 0.5  # the same as a share, where no pixel of an object is flat


class View(Protocol):
    """An image of a split, with the stem that names it."""

    @property
    def stem(self) -> str: ...
    @property
    def image(self) -> Source: ...


V = TypeVar("V", bound=View)
V_co = TypeVar("V_co", bound=View, covariant=True)


@dataclass(frozen=True)
class Split(Generic[V_co]):
    """Which images train and which validate."""

    train: tuple[V_co, ...]
    val: tuple[V_co, ...]


def find_split(
    folder: Path | str,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    mask_suffix: str | None = None,
    stacks: bool = False,
) -> Split[Pair]:
    """Find the pairs of a data folder by their names, and split them; no image is decoded.

    folder holds ``images/`` and ``masks/``, split here at random by ``seed`` (the same for equal
    stems, at least one pair on each side); or ``train/`` and ``val/``, each with both.
    mask_suffix: as in ``find_pairs``   stacks: take each slice of a stack as an image; stacks are
    split, so that the slices of one are on one side
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist or is not a folder")
    if not given_parts(folder):
        split = split_pairs(find_pairs(folder, mask_suffix, stacks), val_fraction, seed, stacks)
    else:
        train, val = (find_pairs(folder / part, mask_suffix, stacks) for part in ("train", "val"))
        split = Split(train, val)
    return Split(slice_pairs(split.train), slice_pairs(split.val)) if stacks else split


def find_scored(
    folder: Path | str, mask_suffix: str | None = None, stacks: bool = False
) -> tuple[Pair, ...]:
    """The pairs of a folder that a score is of: all, or those in val/ where it is split."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist or is not a folder")
    place = folder / "val" if given_parts(folder) else folder
    pairs = find_pairs(place, mask_suffix, stacks)
    return slice_pairs(pairs) if stacks else pairs


def given_parts(folder: Path) -> tuple[str, ...]:
    """("train", "val") of a folder that is split already, () of one that is not."""
    given = [name for name in ("train", "val") if (folder / name).is_dir()]
    if not given:
        return ()
    for name in ("images", "masks"):
        if (folder / name).is_dir():
            raise ValueError(
                f"{folder} has both {name}/ and {given[0]}/; keep either images/ and masks/ or "
                "train/ and val/"
            )
    if len(given) == 1:
        other = "val" if given[0] == "train" else "train"
        raise FileNotFoundError(f"{folder} has {given[0]}/ but no {other}/")
    return ("train", "val")


def load_split(
    folder: Path | str,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    foreground: Foreground = None,
    options: ImageOptions = _AS_TAGGED,
) -> Split[Pair]:
    """``find_split``, with every file decoded and checked."""
    split = find_split(folder, val_fraction=val_fraction, seed=seed)
    check_pairs((*split.train, *split.val), foreground, options)
    return split


class CheckedPair(NamedTuple):
    """What a pair's files hold.

    values: of the mask, each once   lossy, exact, blurred: as in StoredMask
    few: grey values that an object of many stored values keeps in the image; None where enough
    """

    values: list[float]
    lossy: bool
    exact: bool
    few: int | None
    blurred: tuple[int, ...] = ()


def check_pairs(
    pairs: Sequence[Pair],
    foreground: Foreground | Sequence[int] | str = None,
    options: ImageOptions = _AS_TAGGED,
    ignore: Sequence[float] = (),
    threads: int | None = None,
) -> list[CheckedPair]:
    """Decode every file and check sizes and mask values, or raise the first broken rule.

    Without ``foreground`` the masks together may hold two values, one of them 0: anything else
    (three classes, 1 and 2, 255 in one mask and 1 in another) has no obvious foreground. Values
    under ``ignore`` are left out. Returns what was found, in the pairs' order. Warns where lossy
    compression may have moved pixels. threads: files decoded at a time; None: as the processor has
    """
    rule = chosen_foreground(foreground)
    ignore = chosen_ignore(ignore, rule)
    seen: dict[float, MaskSource] = {}  # mask value -> the first mask that holds it
    found: list[CheckedPair] = []
    check = partial(_check_pair, rule=rule, options=options, ignore=ignore)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for pair, checked in zip(pairs, pool.map(check, pairs), strict=True):
                found.append(checked)
                if checked.exact:
                    note_values(pair, checked, seen, rule is None)
        finally:
            pool.shutdown(cancel_futures=True)
    for pair, checked in zip(pairs, found, strict=True):
        if not checked.exact:  # judged last, by what the other masks hold
            note_values(pair, checked, seen, rule is None)
    warn_of_blurred([pair.mask for pair in pairs], found)
    where = pairs[0].mask.parent
    if not seen:
        raise ValueError(
            f"no mask in {where} has a pixel that counts; ignore covers all values: "
            f"{listed(ignore)}"
        )
    if rule is None or isinstance(rule, Above):
        threshold = 0.0 if rule is None else rule.threshold
        if not any(value > threshold for value in seen):
            raise ValueError(
                f"no mask in {where} has a foreground pixel (value > {threshold:g}); they hold "
                f"{listed(sorted(seen))}"
            )
    elif not set(rule) & set(seen):
        raise ValueError(
            f"foreground {listed(rule)} occurs in no mask in {where}; they hold "
            f"{listed(sorted(seen))}"
        )
    return found


def _check_pair(
    pair: Pair, rule: Foreground, options: ImageOptions, ignore: Sequence[float]
) -> CheckedPair:
    image, stored = load_image(pair.image, options)
    mask = load_mask(pair.mask, rule, also=tuple(ignore))
    check_sizes(pair, image, mask.values)
    if ignore and mask.lossy and isinstance(rule, Above) and not rule.any:
        raise ValueError(
            f"mask {pair.mask} uses lossy compression, which changes the values to ignore; save "
            "it as PNG"
        )
    few = None
    if stored is not None and options.range == "auto":
        few = few_levels(image, stored, counted_mask(mask.values, rule, ignore)[0])
    counts = mask.values[~among(mask.values, ignore)] if ignore else mask.values
    return CheckedPair(values_of(counts), mask.lossy, mask.exact, few, mask.blurred)


def few_levels(image: np.ndarray, stored: np.ndarray, inside: np.ndarray) -> int | None:
    """How many grey values an object keeps, where scaling took most of them from it; else None.

    image: uint8 (H, W, 3)   stored: (H, W, bands), what it was scaled from   inside: bool (H, W)
    """
    if not inside.any():
        return None
    kept = len(np.unique(image[inside]))
    had = min(len(np.unique(stored[inside][:, i])) for i in range(stored.shape[2]))
    return kept if kept <= _FEW_LEVELS and had >= 4 * _FEW_LEVELS else None


def warn_of_blurred(masks: Sequence[MaskSource], found: Sequence[CheckedPair]) -> None:
    """Say once that lossy compression may have moved pixels from one value to the other."""
    blurred = [(mask, own.blurred) for mask, own in zip(masks, found, strict=True) if own.blurred]
    if blurred:
        mask, (low, high) = blurred[0]
        constant = sum(own.lossy and len(own.values) == 1 for own in found)
        gone = (
            f"; {constant} masks hold only one value and may have lost an object"
            if constant
            else ""
        )
        warnings.warn(
            f"{len(blurred)} of {len(found)} masks are compressed so strongly that some pixels "
            f"may have the wrong value (values {low} and {high} in {mask}){gone}; save masks as "
            "PNG",
            stacklevel=3,
        )


def note_values(
    pair: Marked,
    checked: CheckedPair,
    seen: dict[float, MaskSource],
    binary: bool,
    advice: str = ADVICE,
) -> None:
    """Add a mask's values to those seen; with ``binary``, ValueError where they have no obvious
    foreground. Values of lossy masks are those seen that are near."""
    values = checked.values
    if checked.lossy:
        values = [_as_seen(value, seen, checked.exact) for value in values]
    for value in values:
        seen.setdefault(value, pair.mask)
    if binary:
        check_binary(pair, values, seen, advice)


def _as_seen(value: float, seen: Iterable[float], exact: bool) -> float:
    others = [s for s in seen if s != 0]  # 0 is kept exactly, and nothing else is taken for it
    if value == 0 or not others:
        return value
    near = min(others, key=lambda s: abs(s - value))
    reach = _LOSSY_STEPS if exact else _ROUGHLY * near
    return near if abs(near - value) <= reach else value


def check_sizes(pair: Marked, image: np.ndarray, mask: np.ndarray) -> None:
    """Raise ValueError when image and mask have different heights or widths."""
    if image.shape[:2] != mask.shape[:2]:
        raise ValueError(
            f"mask {pair.mask} is {mask.shape[1]}x{mask.shape[0]} (width x height) but image "
            f"{pair.image} is {image.shape[1]}x{image.shape[0]}"
        )


def values_of(mask: np.ndarray) -> list[float]:
    """The values that a mask holds, each once."""
    if mask.dtype == np.uint8:
        return np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist()
    return np.unique(mask).tolist()


def check_binary(
    pair: Marked, values: list[float], seen: dict[float, MaskSource], advice: str = ADVICE
) -> None:
    """Raise ValueError when a mask's values, together with those seen so far, have no obvious
    foreground. advice: what the sentence ends with."""
    if len(values) > 2:
        raise ValueError(
            f"mask {pair.mask} holds {len(values)} values ({listed(values)}); expected two; "
            f"{advice}"
        )
    if len(seen) > 2:
        other = next(path for value, path in seen.items() if value not in values)
        raise ValueError(
            f"masks {other} and {pair.mask} together hold more than two values: "
            f"{listed(sorted(seen))}; {advice}"
        )
    if len(seen) == 2 and 0 not in seen:
        raise ValueError(
            f"mask {pair.mask}: the values up to this file are {listed(sorted(seen))}, without 0 "
            f"for the background; {advice}"
        )


def listed(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:_SHOWN_VALUES])
    return shown + (", …" if len(values) > _SHOWN_VALUES else "")


def split_pairs(
    pairs: Sequence[V], val_fraction: float, seed: int, stacks: bool = False
) -> Split[V]:
    """Split at random by ``seed``: round(n · val_fraction) pairs validate, at least one each.

    stacks: a pair may be of stacks, which the sentence about too few says
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction is {val_fraction}; it must be between 0 and 1")
    if len(pairs) < 2:
        raise ValueError(
            f"{pairs[0].image.parent} holds 1 image; training and validation need at least 2"
            + ("; one stack is never divided between them, so cut it in two" * stacks)
        )
    count = min(max(1, round(len(pairs) * val_fraction)), len(pairs) - 1)
    order = np.random.default_rng(seed).permutation(len(pairs))
    chosen = set(order[:count].tolist())
    return Split(
        train=tuple(pair for i, pair in enumerate(pairs) if i not in chosen),
        val=tuple(pair for i, pair in enumerate(pairs) if i in chosen),
    )
