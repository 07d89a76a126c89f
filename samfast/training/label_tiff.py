# SPDX-License-Identifier: Apache-2.0
"""Label images as TIFF: one page of unsigned integers of 16 or 32 bits, deflated.

Pillow writes 32 bits as signed only, so that the few tags are laid out here.
"""

import struct
import zlib

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

_TEXT, _SHORT, _LONG, _DOUBLE = 2, 3, 4, 12
_LETTERS = {_SHORT: "H", _LONG: "I", _DOUBLE: "d"}
_TYPES = {SCALE: _DOUBLE, TIE_POINTS: _DOUBLE, MATRIX: _DOUBLE, DOUBLES: _DOUBLE}
_TYPES |= {KEYS: _SHORT, TEXTS: _TEXT}
_STRIP = 1 << 18  # bytes before they are compressed
_MOST = 2**32 - 2**16  # bytes of a file whose places have 32 bits


def tiff_bytes(labels: np.ndarray, georeference: Georeference | None = None) -> bytes:
    """A TIFF file of uint16 or uint32 (H, W); with the tags of a georeference if one is given."""
    height, width = labels.shape
    bits = 8 * labels.itemsize
    rows = max(1, _STRIP // (width * labels.itemsize))
    data = bytearray(8)
    places, lengths = [], []
    for y in range(0, height, rows):
        strip = zlib.compress(_steps(labels[y : y + rows]).tobytes())
        places.append(len(data))
        lengths.append(len(strip))
        data += strip + bytes(len(strip) % 2)
    tags = {256: (_LONG, [width]), 257: (_LONG, [height]), 258: (_SHORT, [bits])}
    tags |= {259: (_SHORT, [8]), 262: (_SHORT, [1]), 273: (_LONG, places), 277: (_SHORT, [1])}
    tags |= {278: (_LONG, [rows]), 279: (_LONG, lengths), 284: (_SHORT, [1])}
    tags |= {317: (_SHORT, [2]), 339: (_SHORT, [1])}
    kept = {} if georeference is None else georeference.tags
    tags |= {tag: (_TYPES[tag], value) for tag, value in kept.items()}
    entries = b""
    for tag in sorted(tags):
        kind, values = tags[tag]
        packed, count = _packed(kind, values)
        if len(packed) > 4:
            place = len(data)
            data += packed + bytes(len(packed) % 2)
            packed = struct.pack("<I", place)
        entries += struct.pack("<HHI4s", tag, kind, count, packed)
    if len(data) > _MOST:
        raise ValueError(f"takes {len(data)} bytes, more than {_MOST}, which a TIFF file can hold")
    data[:8] = struct.pack("<2sHI", b"II", 42, len(data))
    return bytes(data + struct.pack("<H", len(tags)) + entries + bytes(4))


def _steps(strip: np.ndarray) -> np.ndarray:
    """Each value without the one before it in its row, little-endian: TIFF's predictor 2."""
    steps = strip.copy()
    steps[:, 1:] -= strip[:, :-1]
    return steps.astype(steps.dtype.newbyteorder("<"))


def _packed(kind: int, values) -> tuple[bytes, int]:
    """The bytes of a tag's values, and how many values these are."""
    if kind == _TEXT:
        return values + b"\0", len(values) + 1
    return struct.pack(f"<{len(values)}{_LETTERS[kind]}", *values), len(values)
