# SPDX-License-Identifier: Apache-2.0
"""Label images, masks and maps as TIFF: deflated pages of one value for each pixel.

Pillow writes 32 bits as signed only, so that the few tags are laid out here.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from samfast.training.georeference import (
    DOUBLES,
    KEYS,
    MATRIX,
    SCALE,
    TEXTS,
    TIE_POINTS,
    Georeference,
)

_TEXT, _SHORT, _LONG, _DOUBLE, _LONG8 = 2, 3, 4, 12, 16
_LETTERS = {_SHORT: "H", _LONG: "I", _DOUBLE: "d", _LONG8: "Q"}
_TYPES = {SCALE: _DOUBLE, TIE_POINTS: _DOUBLE, MATRIX: _DOUBLE, DOUBLES: _DOUBLE}
_TYPES |= {KEYS: _SHORT, TEXTS: _TEXT}
_STRIP = 1 << 18  # bytes before they are compressed
_MOST = 2**32 - 2**16  # bytes of a file whose places have 32 bits


def tiff_bytes(labels: np.ndarray, georeference: Georeference | None = None) -> bytes:
    """A TIFF file of uint16 or uint32 (H, W); with the tags of a georeference if one is given."""
    file = io.BytesIO()
    Pages(file).add(labels, georeference)
    if len(file.getbuffer()) > _MOST:
        raise ValueError(
            f"takes {len(file.getbuffer())} bytes, more than {_MOST}, which a TIFF file can hold"
        )
    return file.getvalue()


def is_big(values: int) -> bool:
    """Whether so many values of 32 bits may take more than places of 32 bits reach."""
    return 4 * values > _MOST - (_MOST >> 4)  # what cannot be compressed grows a little


_Values = bytes | Sequence[float]  # of a tag: a text, or numbers


class Pages:
    """Writes pages to an open file, one after the other; after each the file is a whole TIFF.

    big: BigTIFF, whose places have 64 bits
    """

    def __init__(self, file: BinaryIO, big: bool = False):
        self.file = file
        self._entry, self._place = ("<HHQ8s", "<Q") if big else ("<HHI4s", "<I")
        self._count = "<Q" if big else "<H"
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if big else b"II*\0" + bytes(4))
        self._link = file.tell() - struct.calcsize(self._place)  # the place of the next page's

    def add(self, values: np.ndarray, georeference: Georeference | None = None) -> None:
        """values: (H, W), uint8, uint16, uint32 or float32"""
        height, width = values.shape
        floats = values.dtype.kind == "f"
        rows = max(1, _STRIP // (width * values.itemsize))
        places, lengths = [], []
        for y in range(0, height, rows):
            strip = values[y : y + rows]
            data = strip.astype("<f4").tobytes() if floats else _steps(strip).tobytes()
            data = zlib.compress(data)
            places.append(self._append(data))
            lengths.append(len(data))
        at = _LONG8 if self._place == "<Q" else _LONG
        tags: dict[int, tuple[int, _Values]] = {256: (_LONG, [width]), 257: (_LONG, [height])}
        tags |= {258: (_SHORT, [8 * values.itemsize]), 259: (_SHORT, [8]), 262: (_SHORT, [1])}
        tags |= {273: (at, places), 277: (_SHORT, [1]), 278: (_LONG, [rows])}
        tags |= {279: (at, lengths), 284: (_SHORT, [1]), 317: (_SHORT, [1 if floats else 2])}
        tags |= {339: (_SHORT, [3 if floats else 1])}
        kept = {} if georeference is None else georeference.tags
        self._link_to(tags | {tag: (_TYPES[tag], value) for tag, value in kept.items()})

    def _append(self, data: bytes) -> int:
        """Write bytes to the end of the file, which stays even; returns their place."""
        place = self.file.seek(0, 2)
        self.file.write(data + bytes(len(data) % 2))
        return place

    def _link_to(self, tags: dict[int, tuple[int, _Values]]) -> None:
        """Write a page's directory and let the page before it, or the header, point there."""
        entries, pointer = b"", struct.calcsize(self._place)
        for tag in sorted(tags):
            kind, values = tags[tag]
            packed, count = _packed(kind, values)
            if len(packed) > pointer:
                packed = struct.pack(self._place, self._append(packed))
            entries += struct.pack(self._entry, tag, kind, count, packed)
        head = struct.pack(self._count, len(tags))
        place = self._append(head + entries + bytes(pointer))
        self.file.seek(self._link)
        self.file.write(struct.pack(self._place, place))
        self._link = place + len(head) + len(entries)


def _steps(strip: np.ndarray) -> np.ndarray:
    """Each value without the one before it in its row, little-endian: TIFF's predictor 2."""
    steps = strip.copy()
    steps[:, 1:] -= strip[:, :-1]
    return steps.astype(steps.dtype.newbyteorder("<"))


def _packed(kind: int, values: _Values) -> tuple[bytes, int]:
    """The bytes of a tag's values, and how many values these are."""
    if isinstance(values, bytes):  # of kind _TEXT
        return values + b"\0", len(values) + 1
    return struct.pack(f"<{len(values)}{_LETTERS[kind]}", *values), len(values)
