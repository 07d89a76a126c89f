# SPDX-License-Identifier: Apache-2.0
"""Arrays in .npy files: the header is checked against the file before anything is read.

Raises ValueError (FileNotFoundError for a missing file) with one sentence that names the file.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_MOST = 2**31 - 1


def read_numbers(path: Path, index: int | None = None, axes: int = 2) -> np.ndarray:
    """An array of whole numbers or floats, of any shape.

    index: of a slice of so many axes, of which only that is read
    """
    values = _array(path) if index is None else read_array(path, index, axes)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{path} does not hold an array of numbers")
    return values


def shape_of(path: Path) -> tuple[int, ...]:
    """The shape that a file's header says."""
    _check_file(path)
    with _decoding(path), path.open("rb") as file:
        return _header(file)[0]


def read_mask_array(path: Path, index: int | None = None) -> np.ndarray:
    """(H, W): uint8 of bools, else whole numbers of at most 32 bits.

    index: of a slice, of which only that is read
    """
    values = _array(path) if index is None else read_array(path, index, 2)
    name = path if index is None else f"{path}[{index}]"
    if values.dtype.kind not in "biu" or values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"mask {name} holds {values.dtype} {values.shape}; expected bool or whole numbers, "
            "(height, width)"
        )
    if values.dtype == bool:
        return values.astype(np.uint8)
    for value in (int(values.min()), int(values.max())):
        if not -_MOST - 1 <= value <= _MOST:
            raise ValueError(
                f"mask {name} holds the value {value}; expected at most 32 bits, {-_MOST - 1} to "
                f"{_MOST}"
            )
    return values.astype(np.int32 if values.itemsize > 2 else values.dtype.newbyteorder("="))


def _array(path: Path) -> np.ndarray:
    _check_file(path)
    with _decoding(path), path.open("rb") as file:
        _check_header(file, path.stat().st_size)
        file.seek(0)
        return np.load(file, allow_pickle=False)


def read_array(path: Path, index: int, axes: int) -> np.ndarray:
    """One slice of an array of any type, and no other byte; the whole of one of ``axes`` axes."""
    _check_file(path)
    with _decoding(path):
        with path.open("rb") as file:
            shape = _check_header(file, path.stat().st_size, axes)
        count = 1 if len(shape) == axes else shape[0]
        if index >= count:
            raise ValueError(f"it has {count} slices, and {index} is not one of them")
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.array(values if len(shape) == axes else values[index])


def _check_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Say which file is damaged."""
    try:
        yield
    except (OSError, ValueError, TypeError, EOFError, SyntaxError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be decoded: {reason}") from None


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array; ValueError for what is not read."""
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"its version of .npy is {version[0]}.{version[1]}; expected 1.0 or 2.0")
    shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("Object arrays are not read; save an array of numbers")
    if any(length < 0 for length in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, dtype


def _check_header(file: BinaryIO, size: int, axes: int | None = None) -> tuple[int, ...]:
    """The shape. ValueError where a header promises more than the file or the memory should hold.

    axes: of a slice, where only one is read
    """
    shape, dtype = _header(file)
    count = math.prod(shape)
    if axes is not None and len(shape) not in (axes, axes + 1):
        raise ValueError(f"its shape is {shape}; expected slices of {axes} axes")
    one = shape if axes is None or len(shape) == axes else shape[1:]
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and math.prod(one[:2]) > limit:
        raise ValueError(f"its shape is {shape}, more than {limit} pixels; cut it into parts")
    if count * dtype.itemsize > size - file.tell():
        raise ValueError(f"it is truncated: {dtype} {shape} takes more than its {size} bytes")
    return shape
