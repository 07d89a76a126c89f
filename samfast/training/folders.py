# SPDX-License-Identifier: Apache-2.0
"""A folder of ``images/`` and ``masks/``: pairing by stem, checking every file, splitting.

Each broken rule is one ValueError or FileNotFoundError, a sentence with the file and the values,
and all of them are found before training begins.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samfast.training.images import SUFFIXES, read_image, read_mask

_DESKTOP_FILES = ("thumbs.db", "desktop.ini")
_SHOWN_VALUES = 5


@dataclass(frozen=True)
class Pair:
    """One image file and its mask file."""

    stem: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Split:
    """Which pairs train and which validate."""

    train: tuple[Pair, ...]
    val: tuple[Pair, ...]


def find_split(folder: Path | str, *, val_fraction: float = 0.2, seed: int = 0) -> Split:
    """Find the pairs of a data folder by their names, and split them; no file is opened.

    folder holds ``images/`` and ``masks/``, split here at random by ``seed`` (the same for equal
    stems, at least one pair on each side); or ``train/`` and ``val/``, each with both.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist or is no folder")
    if not given_parts(folder):
        return split_pairs(find_pairs(folder), val_fraction, seed)
    return Split(find_pairs(folder / "train"), find_pairs(folder / "val"))


def find_scored(folder: Path | str) -> tuple[Pair, ...]:
    """The pairs of a folder that a score is of: all, or those in val/ where it is split."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist or is no folder")
    return find_pairs(folder / "val" if given_parts(folder) else folder)


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
    foreground: Sequence[int] | None = None,
) -> Split:
    """``find_split``, with every file decoded and checked."""
    split = find_split(folder, val_fraction=val_fraction, seed=seed)
    check_pairs((*split.train, *split.val), foreground)
    return split


def find_pairs(folder: Path) -> tuple[Pair, ...]:
    """Match ``images/`` and ``masks/`` of a folder by stem, sorted; every file must match."""
    images = files_by_stem(folder, "images")
    masks = files_by_stem(folder, "masks")
    if not images:
        raise ValueError(f"{folder / 'images'} holds no image ({', '.join(SUFFIXES)})")
    for stem, path in images.items():
        if stem not in masks:
            raise ValueError(f"image {path} has no mask of the same stem in {folder / 'masks'}")
    for stem, path in masks.items():
        if stem not in images:
            raise ValueError(f"mask {path} has no image of the same stem in {folder / 'images'}")
    return tuple(Pair(stem, images[stem], masks[stem]) for stem in sorted(images))


def files_by_stem(folder: Path, name: str, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """The files of a subfolder, sorted; ValueError for what is none of the suffixes."""
    subfolder = folder / name
    if not subfolder.is_dir():
        raise FileNotFoundError(f"{folder} has no folder {name}/")
    files: dict[str, Path] = {}
    for path in sorted(subfolder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _DESKTOP_FILES:
            continue
        if path.is_dir():
            raise ValueError(f"{subfolder} holds a folder, {path.name}/; put the files directly")
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"{path} is none of {', '.join(suffixes)}; move it elsewhere")
        if path.stem in files:
            raise ValueError(
                f"{subfolder} holds two files of the stem {path.stem}: "
                f"{files[path.stem].name} and {path.name}"
            )
        files[path.stem] = path
    return files


def check_pairs(pairs: Sequence[Pair], foreground: Sequence[int] | None = None) -> None:
    """Decode every file and check sizes and mask values, or raise the first broken rule.

    Without ``foreground`` the masks together may hold two values, one of them 0: anything else
    (three classes, 1 and 2, 255 in one mask and 1 in another) has no obvious foreground.
    """
    if foreground is not None and not foreground:
        raise ValueError("foreground is empty; name at least one mask value")
    seen: dict[float, Path] = {}  # mask value -> the first mask that holds it
    with ThreadPoolExecutor() as pool:
        try:
            for pair, values in zip(pairs, pool.map(_check_pair, pairs), strict=True):
                for value in values:
                    seen.setdefault(value, pair.mask)
                if foreground is None:
                    check_binary(pair, values, seen)
        finally:
            pool.shutdown(cancel_futures=True)
    if foreground is None and not any(value > 0 for value in seen):
        raise ValueError(f"no mask in {pairs[0].mask.parent} has a foreground pixel (value > 0)")
    if foreground is not None and not set(foreground) & set(seen):
        raise ValueError(
            f"foreground {listed(foreground)} occurs in no mask in {pairs[0].mask.parent}, which "
            f"hold {listed(sorted(seen))}"
        )


def _check_pair(pair: Pair) -> list[float]:
    image, mask = read_image(pair.image), read_mask(pair.mask)
    check_sizes(pair, image, mask)
    return values_of(mask)


def check_sizes(pair: Pair, image: np.ndarray, mask: np.ndarray) -> None:
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


def check_binary(pair: Pair, values: list[float], seen: dict[float, Path]) -> None:
    """Raise ValueError when a mask's values, together with those seen so far, have no obvious
    foreground."""
    advice = "name the foreground's values with --foreground (foreground=)"
    if len(values) > 2:
        raise ValueError(
            f"mask {pair.mask} holds {len(values)} values ({listed(values)}) where two are "
            f"expected; {advice}"
        )
    if len(seen) > 2:
        other = next(path for value, path in seen.items() if value not in values)
        raise ValueError(
            f"masks disagree: {other} and {pair.mask} together hold the values "
            f"{listed(sorted(seen))}; {advice}"
        )
    if len(seen) == 2 and 0 not in seen:
        raise ValueError(
            f"mask {pair.mask}: the values so far are {listed(sorted(seen))}, none of them the "
            f"background 0; {advice}"
        )


def listed(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:_SHOWN_VALUES])
    return shown + (", …" if len(values) > _SHOWN_VALUES else "")


def split_pairs(pairs: Sequence[Pair], val_fraction: float, seed: int) -> Split:
    """Split at random by ``seed``: round(n · val_fraction) pairs validate, at least one each."""
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")
    if len(pairs) < 2:
        raise ValueError(
            f"{pairs[0].image.parent} holds 1 image; training and validation need at least 2"
        )
    count = min(max(1, round(len(pairs) * val_fraction)), len(pairs) - 1)
    order = np.random.default_rng(seed).permutation(len(pairs))
    chosen = set(order[:count].tolist())
    return Split(
        train=tuple(pair for i, pair in enumerate(pairs) if i not in chosen),
        val=tuple(pair for i, pair in enumerate(pairs) if i in chosen),
    )
