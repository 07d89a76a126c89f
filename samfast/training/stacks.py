# SPDX-License-Identifier: Apache-2.0
"""Stacks: files whose pages are images of their own, and the name of one such slice.

A stack is a TIFF of several pages, or a .npy array of one axis more than an image. Headers are
read here, no pixel is decoded. Raises ValueError with one sentence that names the file.
"""

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samfast.training import tiff_pages as t
from samfast.training.npy_files import read_array, shape_of
from samfast.training.scaling import Samples
from samfast.training.tiff_pages import Page, read_pages
from samfast.training.tiff_tags import BLACK_IS_ZERO, RGB, Tags, full_pages

_NARROWEST = 8  # pixels of a slice in an array; a shorter last axis is of channels
_CHANNELS = re.compile(r'SizeC="(\d+)"')


@dataclass(frozen=True)
class Slice:
    """One slice of a stack, in place of the path of an image file.

    index: among the file's slices, from 0   name: such as cells.tif[12]; ``stem`` is the same
    """

    file: Path
    index: int

    def __str__(self) -> str:
        return f"{self.file}[{self.index}]"

    @property
    def name(self) -> str:
        return f"{self.file.name}[{self.index}]"

    @property
    def stem(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        return self.file.suffix

    @property
    def parent(self) -> Path:
        return self.file.parent


Source = Path | Slice  # what an image or a mask is read from


def source_of(path: Source | str) -> Source:
    """A slice as it is, anything else as a path."""
    return path if isinstance(path, Slice) else Path(path)


def file_of(source: Source) -> Path:
    """The file that holds an image, alone or with other slices."""
    return source.file if isinstance(source, Slice) else source


def index_of(source: Source) -> int | None:
    """The index of a slice; None of a whole file."""
    return source.index if isinstance(source, Slice) else None


def image_slices(path: Path) -> tuple[Source, ...]:
    """The images in a file: itself, or its slices in their order.

    A .npy array is (H, W), (H, W, 3) of one colour image, (slices, H, W) or (slices, H, W, 3). A
    TIFF of one page, and a file of another format, is one image.
    """
    if path.suffix.lower() != ".npy":
        return _pages(path)
    shape = shape_of(path)
    axes = len(shape) - (_image_axes(shape) - 2)
    if axes not in (2, 3) or (_is_narrow(shape) and shape[-1] != 3) or 0 in shape:
        raise ValueError(
            f"image {path} has the shape {shape}; expected (height, width), (height, width, 3), "
            "(slices, height, width) or (slices, height, width, 3)"
        )
    return _slices(path, 1 if axes == 2 else shape[0])


def _is_narrow(shape: tuple[int, ...]) -> bool:
    """Whether the last axis is too short for the width of a slice."""
    return len(shape) > 2 and shape[-1] < _NARROWEST


def _image_axes(shape: tuple[int, ...]) -> int:
    """How many axes an image of a .npy array has: a last one of 3 is its colours."""
    return 3 if len(shape) > 2 and shape[-1] == 3 else 2


def array_samples(source: Slice) -> Samples:
    """What a slice of a .npy array stores: bools, whole numbers or floats, grey or RGB."""
    shape = shape_of(source.file)
    values = read_array(source.file, source.index, _image_axes(shape))
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise ValueError(f"image {source} holds {values.dtype}; expected whole numbers or floats")
    flags = values.dtype == bool
    kind = "u" if flags else values.dtype.kind
    values = values.astype(np.uint8 if flags else values.dtype.newbyteorder("="))
    values = values.reshape(*values.shape[:2], -1)
    bits, samples = 1 if flags else 8 * values.itemsize, values.shape[2]
    colours = RGB if samples == 3 else BLACK_IS_ZERO
    return Samples(values, Tags(samples, bits, kind, colours))


def mask_slices(path: Path, channels: int = 1) -> tuple[Source, ...]:
    """The masks in a file, as ``image_slices``; an array is (H, W) or (slices, H, W).

    channels: of measured values, which are the last axis of an array where there are several
    """
    if path.suffix.lower() != ".npy":
        return _pages(path)
    shape = shape_of(path)
    own = 2 if channels == 1 else 3
    narrow = channels == 1 and _is_narrow(shape)
    if len(shape) not in (own, own + 1) or 0 in shape or narrow:
        last = "" if channels == 1 else f", {channels}"
        raise ValueError(
            f"mask {path} has the shape {shape}; expected (height, width{last}) or (slices, "
            f"height, width{last})"
        )
    return _slices(path, 1 if len(shape) == own else shape[0])


def check_as_many(image: Source, mask: Source, images: int, masks: int) -> None:
    """Raise ValueError if an image and its mask differ in their numbers of slices."""
    if images != masks:
        raise ValueError(
            f"image {image} has {_counted(images)} but mask {mask} has {masks}; save a mask with "
            "as many slices"
        )


def of_stacks(sources: Iterable[Source]) -> dict[Path, int]:
    """How many of these slices each stack has, by its file."""
    counts: dict[Path, int] = {}
    for source in sources:
        if isinstance(source, Slice):
            counts[source.file] = counts.get(source.file, 0) + 1
    return counts


def _counted(count: int) -> str:
    return f"{count} slice{'s' if count != 1 else ''}"


def _slices(path: Path, count: int) -> tuple[Slice, ...]:
    return tuple(Slice(path, i) for i in range(count))


def _pages(path: Path) -> tuple[Source, ...]:
    """The pages of a TIFF that are pictures of their own; any other file itself."""
    if not path.is_file():
        return (path,)  # whose reading says what is wrong
    try:
        with path.open("rb") as file:
            if file.read(4) not in t.SIGNATURES:
                return (path,)
            pages = read_pages(file)
        full = [pages[i] for i in full_pages([page.kind for page in pages])]
        sizes = [(page.number(t.WIDTH), page.number(t.HEIGHT)) for page in full]
    except (ValueError, OSError, struct.error) as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from None
    if len(full) == 1:
        return (path,)
    for i, (width, height) in enumerate(sizes):
        if (width, height) != sizes[0]:
            raise ValueError(
                f"{path} has pages of different sizes: {sizes[0][0]}x{sizes[0][1]} (width x "
                f"height) and, {path.name}[{i}], {width}x{height}; save only the slices"
            )
    if (channels := _channels(full[0])) > 1:
        raise ValueError(
            f"{path} holds {channels} channels as separate pages; save one channel as a stack. If "
            "the pages are slices, say so (in tifffile with metadata={'axes': 'ZYX'})"
        )
    return _slices(path, len(full))


def _channels(page: Page) -> int:
    """How many channels ImageJ, OME or tifffile say are spread over pages; 1 where none does."""
    text = page.text(t.DESCRIPTION)
    if text.startswith("ImageJ="):
        lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        told = lines.get("channels", "")
        return int(told) if told.isdecimal() else 1
    if (found := _CHANNELS.search(text)) is not None and "<OME" in text:
        return max(1, int(found[1]) // page.number(t.SAMPLES, 1))
    try:
        told = json.loads(text) if text.startswith("{") else {}
    except ValueError:
        return 1
    axes, shape = told.get("axes"), told.get("shape")
    if not isinstance(axes, str) or not isinstance(shape, list) or len(axes) != len(shape):
        return 1
    spread = [n for axis, n in zip(axes[:-2], shape, strict=False) if axis == "C"]
    return next((n for n in spread if isinstance(n, int)), 1)
