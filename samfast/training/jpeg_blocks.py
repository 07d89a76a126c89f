# SPDX-License-Identifier: Apache-2.0
"""What JPEG does to a mask, known from a file's own quantisation steps.

JPEG codes each block of 8 x 8 pixels on its own. So a block of one value decodes to one value, and
the right guess of a mask, coded again with the same steps, decodes to what the file decodes to.
"""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from samfast.training.orientation import as_stored, upright

MOST_SIDE = 65500  # pixels of a JPEG that libjpeg writes; a TIFF's parts can make up more
_BLOCK = 8
# Where each step of a file's table belongs, row by row: diagonals, every other one upwards.
_ZIGZAG = sorted(
    range(64),
    key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8),
)


@dataclass(frozen=True)
class Coding:
    """steps: the 64 of brightness, row by row   turn: the orientation that was applied after"""

    steps: tuple[int, ...]
    turn: int = 1

    def again(self, mask: np.ndarray) -> np.ndarray:
        """uint8 (H, W): the mask after it went through the same JPEG."""
        stored = Image.fromarray(np.ascontiguousarray(as_stored(mask, self.turn)))
        file = io.BytesIO()
        stored.save(file, "JPEG", qtables=[list(self.steps)])
        with Image.open(file, formats=("JPEG",)) as image:
            return np.ascontiguousarray(upright(np.asarray(image), self.turn))

    def of_one_value(self, value: int) -> int:
        """What a block of this value decodes to."""
        return int(self.again(np.full((_BLOCK, _BLOCK), value, np.uint8))[0, 0])

    def blocks(self, grey: np.ndarray) -> np.ndarray:
        """uint8 (blocks, 64): the whole blocks of a decoded mask."""
        stored = as_stored(grey, self.turn)
        rows, columns = (side // _BLOCK for side in stored.shape)
        whole = stored[: rows * _BLOCK, : columns * _BLOCK]
        cut = whole.reshape(rows, _BLOCK, columns, _BLOCK).swapaxes(1, 2)
        return cut.reshape(rows * columns, _BLOCK**2)


def coding_of(steps: Sequence[int] | None, turn: int = 1) -> Coding | None:
    """None for steps that are not known, or that this JPEG writer cannot use again."""
    if steps is None or len(steps) != 64 or not all(0 < step < 256 for step in steps):
        return None
    return Coding(tuple(steps), turn)


def first_steps(data: bytes) -> tuple[int, ...] | None:
    """The steps of table 0 in a JPEG stream or in a TIFF's JPEGTables, row by row."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, size = struct.unpack_from(">BH", data, at + 1)
        table, end = at + 4, min(at + 2 + size, len(data))
        while marker == 0xDB and table < end:
            width = 2 if data[table] >> 4 else 1
            steps = data[table + 1 : table + 1 + 64 * width]
            if data[table] & 15 == 0 and len(steps) == 64 * width:
                in_file = struct.unpack(">64" + "BH"[width - 1], steps)
                order = dict(zip(_ZIGZAG, in_file, strict=True))
                return tuple(order[i] for i in range(64))
            table += 1 + 64 * width
        if marker == 0xDA or size < 2:
            return None
        at = end
    return None
