# SPDX-License-Identifier: Apache-2.0
"""Images and their masks by the names of their files, of which only stacks are opened.

Each broken rule is one ValueError or FileNotFoundError, a sentence with the file.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from samfast.training.coco_items import MaskSource
from samfast.training.image_files import MASK_ONLY, SUFFIXES
from samfast.training.stacks import Source, check_as_many, file_of, image_slices, mask_slices

_DESKTOP_FILES = ("thumbs.db", "desktop.ini")
MASK_SUFFIXES = (*SUFFIXES, *MASK_ONLY)
STACK_SUFFIXES = (*SUFFIXES, ".npy")  # of images, with --stacks


@dataclass(frozen=True)
class Marked:
    """One image and its truth: a mask, or the annotations of its objects."""

    stem: str
    image: Source
    mask: MaskSource


@dataclass(frozen=True)
class Pair(Marked):
    """One image and its mask: files, or slices of files."""

    mask: Source


def find_pairs(
    folder: Path, mask_suffix: str | None = None, stacks: bool = False
) -> tuple[Pair, ...]:
    """Match ``images/`` and ``masks/`` of a folder by stem, sorted; every file must match.

    mask_suffix: text after the image's stem in mask names. Masks are in ``masks/`` or, if there is
        none, next to the images, which are in ``images/`` or, if there is none, in the folder
    stacks: images may be .npy arrays, too; ``slice_pairs`` splits stacks
    """
    suffixes = STACK_SUFFIXES if stacks else SUFFIXES
    if mask_suffix is not None:
        return _suffixed(folder, mask_suffix, suffixes)
    images = files_by_stem(folder, "images", suffixes)
    masks = files_by_stem(folder, "masks", MASK_SUFFIXES)
    if not images:
        raise ValueError(f"{folder / 'images'} has no images ({', '.join(suffixes)})")
    for stem, path in images.items():
        if stem not in masks:
            raise ValueError(f"image {path} has no mask with the same stem in {folder / 'masks'}")
    for stem, path in masks.items():
        if stem not in images:
            raise ValueError(f"mask {path} has no image with the same stem in {folder / 'images'}")
    return tuple(Pair(stem, images[stem], masks[stem]) for stem in sorted(images))


def slice_pairs(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Split stacks into a pair for each slice; leave other pairs as they are.

    Only headers are read. Raises ValueError if image and mask have different numbers of slices.
    """
    found = []
    for pair in pairs:
        images, masks = image_slices(file_of(pair.image)), mask_slices(file_of(pair.mask))
        check_as_many(pair.image, pair.mask, len(images), len(masks))
        found += [Pair(own.stem, own, mask) for own, mask in zip(images, masks, strict=True)]
    return tuple(found)


def _suffixed(folder: Path, suffix: str, suffixes: Sequence[str]) -> tuple[Pair, ...]:
    """``find_pairs`` of masks that are called as their images with a suffix."""
    own = (folder / "masks").is_dir()
    at = "images" if own or (folder / "images").is_dir() else "."
    if own:
        images = files_by_stem(folder, at, suffixes)
        masks = files_by_stem(folder, "masks", MASK_SUFFIXES)
    else:
        images, masks = _parted(files_by_stem(folder, at, MASK_SUFFIXES), suffix)
        for path in images.values():
            _check_ending(path, suffixes)
    if not images:
        but = f", only files whose stems end in {suffix}" if masks else ""
        raise ValueError(f"{folder / at} has no images ({', '.join(suffixes)}){but}")
    where = folder / ("masks" if own else at)
    return tuple(_matched(images, masks, suffix, where))


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
            raise ValueError(f"{subfolder} contains the folder {path.name}/; move its files up")
        _check_ending(path, suffixes)
        if path.stem in files:
            raise ValueError(
                f"{subfolder} holds two files with the stem {path.stem}: {files[path.stem].name} "
                f"and {path.name}"
            )
        files[path.stem] = path
    return files


def _check_ending(path: Path, suffixes: Sequence[str]) -> None:
    if path.suffix.lower() not in suffixes:
        array = path.suffix.lower() == ".npy"
        more = ", or give --stacks to read arrays as images" if array else ""
        raise ValueError(f"{path} is not a {', '.join(suffixes)} file; move it elsewhere{more}")


def _parted(files: Mapping[str, Path], suffix: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and masks among the files of one folder, by stem: masks end in the suffix.

    Raises ValueError for the mask of what is a mask itself.
    """
    masks = {stem: path for stem, path in files.items() if stem.endswith(suffix)}
    for stem, path in masks.items():
        if (other := masks.get(stem.removesuffix(suffix))) is not None:
            raise ValueError(
                f"{path} is ambiguous: its image {other.name} also ends in {suffix}, as masks do; "
                "rename one of them"
            )
    return {stem: path for stem, path in files.items() if stem not in masks}, masks


def _matched(
    images: Mapping[str, Path], masks: Mapping[str, Path], suffix: str, where: Path
) -> Iterator[Pair]:
    """Each image with the mask of its stem and the suffix, sorted; files by stem.

    where: the folder of masks
    """
    for stem, path in images.items():
        if stem + suffix not in masks:
            raise ValueError(f"image {path} has no mask with the stem {stem}{suffix} in {where}")
    for name, path in masks.items():
        if not name.endswith(suffix):
            raise ValueError(f"mask {path} does not end in {suffix} before its file type")
        if name.removesuffix(suffix) not in images:
            raise ValueError(
                f"mask {path} has no image with the stem {name.removesuffix(suffix)!r}"
            )
    for stem in sorted(images):
        yield Pair(stem, images[stem], masks[stem + suffix])


def check_suffix(suffix: str | None) -> None:
    """Raise ValueError for a text that cannot stand at the end of a mask's stem."""
    if suffix is None:
        return
    if not suffix or any(sign in suffix for sign in "/\\\0"):
        raise ValueError(
            f"mask_suffix is {suffix!r}; expected the text after a file's stem, such as _mask"
        )
    if suffix.lower().endswith(MASK_SUFFIXES):
        raise ValueError(
            f"mask_suffix is {suffix}; leave out the file type: _mask stands for photo_mask.png"
        )
