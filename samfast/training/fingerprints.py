# SPDX-License-Identifier: Apache-2.0
"""Digests of the images and masks that a run trains on, so that a changed one is noticed."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from samfast.training.coco_items import CocoMask, MaskSource
from samfast.training.file_pairs import Marked
from samfast.training.stacks import file_of

_PIECE = 2**20  # bytes read at a time
_DIGITS = 16


def read_from(source: MaskSource) -> Path | CocoMask:
    """The file of a source, or what annotations say of one image."""
    return source if isinstance(source, CocoMask) else file_of(source)


def of_files(paths: Iterable[Path | CocoMask]) -> str:
    """Hash the bytes of these files, or what annotations say of an image, in their order."""
    found = hashlib.blake2b()
    for path in paths:
        if isinstance(path, CocoMask):
            found.update(path.digest())
            continue
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                found.update(piece)
    return found.hexdigest()[:_DIGITS]


def of_arrays(*arrays: np.ndarray) -> str:
    """Hash the types, shapes and values of these arrays."""
    found = hashlib.blake2b()
    for array in arrays:
        found.update(f"{array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:_DIGITS]


def of_pairs(parts: Mapping[str, Sequence[Marked]]) -> dict[str, str]:
    """``of_all`` of the pairs of each part, by part and stem; a stack counts once, as a file."""
    return of_all(
        {
            f"{part}/{file_of(pair.image).stem}": [file_of(pair.image), read_from(pair.mask)]
            for part, pairs in parts.items()
            for pair in pairs
        }
    )


def of_all(files: Mapping[str, Sequence[Path | CocoMask]]) -> dict[str, str]:
    """``of_files`` for each name; several at a time, as reading waits for the disk."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(of_files, files.values()), strict=True))
