# SPDX-License-Identifier: Apache-2.0
"""The pages of a TIFF file as tables of tags: classic and BigTIFF, both byte orders.

Only tags that samfast reads are kept. Nothing that a file says can make this loop or take more
memory than the file is long.
"""

import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import BinaryIO

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MOST_PAGES, MOST_TAGS = 100_000, 4096
# What the numbers of the specification are called here.
KIND, OLD_KIND, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
FILL_ORDER, DESCRIPTION, OFFSETS, ORIENTATION, SAMPLES = 266, 270, 273, 274, 277
ROWS, COUNTS, PLANAR, PREDICTOR, COLOURS = 278, 279, 284, 317, 320
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, INK_SET = 322, 323, 324, 325, 332
EXTRA, FORMAT, JPEG_TABLES, DEPTH, NO_DATA = 338, 339, 347, 32997, 42113
_KEPT = {
    *(KIND, OLD_KIND, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, DESCRIPTION),
    *(OFFSETS, ORIENTATION, SAMPLES, ROWS, COUNTS, PLANAR, PREDICTOR, COLOURS, TILE_WIDTH),
    *(TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, INK_SET, EXTRA, FORMAT, JPEG_TABLES, DEPTH),
    NO_DATA,
}
_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 7: "s", 8: "h", 9: "i", 13: "I"}
_TYPES |= {16: "Q", 17: "q", 18: "Q"}
_DOUBLE = 12  # of tags that are asked for only


TagValues = dict[int, tuple[int, ...] | bytes]  # by number


@dataclass(frozen=True)
class Page:
    """order: "<" or ">"   tags: by number, texts as bytes and all else as tuples of integers, or of
    floats where ``also`` asked for the tag"""

    order: str
    tags: TagValues

    def numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The values of a tag; raises ValueError if it holds none."""
        value = self.tags.get(tag, default)
        if isinstance(value, bytes) or (tag in self.tags and not value):
            raise ValueError(f"its tag {tag} does not hold a number")
        return value

    def number(self, tag: int, default: int | None = None) -> int:
        """The value of a tag; raises ValueError if it is missing and has no default."""
        values = self.numbers(tag, () if default is None else (default,))
        if not values:
            raise ValueError(f"it has no tag {tag}")
        return values[0]

    def text(self, tag: int) -> str:
        value = self.tags.get(tag, b"")
        return value.decode("latin-1") if isinstance(value, bytes) else ""

    @property
    def kind(self) -> int:
        """NewSubfileType, where only the old SubfileType is given in its terms."""
        old = {2: 1}.get(self.number(OLD_KIND, 1), 0)
        return self.number(KIND, old)


def read_pages(file: BinaryIO, also: Collection[int] = ()) -> list[Page]:
    """The pages of the file's chain, in its order; raises ValueError if the file is damaged.

    also: tags to keep besides those that pictures need; these may be floats of 64 bits
    """
    size = file.seek(0, 2)
    header = _taken(file, 0, 8, size)
    order, big = "<" if header[:1] == b"I" else ">", header[2:4] in (b"+\0", b"\0+")
    if big:
        width, zero, offset = struct.unpack(order + "HHQ", _taken(file, 4, 12, size))
        if (width, zero) != (8, 0):
            raise ValueError("its header is damaged")
    else:
        (offset,) = struct.unpack(order + "I", header[4:])
    pages: list[Page] = []
    seen: set[int] = set()
    while offset:
        if offset in seen or len(pages) == MOST_PAGES:
            raise ValueError("its list of pages does not end")
        seen.add(offset)
        tags, offset = _directory(file, offset, size, order, big, also)
        pages.append(Page(order, tags))
    if not pages:
        raise ValueError("it has no pages")
    return pages


def _directory(
    file: BinaryIO, offset: int, size: int, order: str, big: bool, also: Collection[int]
) -> tuple[TagValues, int]:
    """The kept tags of one page, and where the next page begins."""
    entry, pointer = ("HHQ8s", "Q") if big else ("HHI4s", "I")
    head, entry_size = struct.calcsize("=Q" if big else "=H"), struct.calcsize("=" + entry)
    (count,) = struct.unpack(order + ("Q" if big else "H"), _taken(file, offset, head, size))
    if not 0 < count <= MOST_TAGS:
        raise ValueError(f"a page of it has {count} tags")
    length = count * entry_size + struct.calcsize("=" + pointer)
    table = _taken(file, offset + head, length, size)
    tags: TagValues = {}
    for i in range(count):
        tag, kind, number, value = struct.unpack_from(order + entry, table, i * entry_size)
        letter = "d" if tag in also and kind == _DOUBLE else _TYPES.get(kind)
        if letter is None or tag in tags or not (tag in _KEPT or tag in also):
            continue
        needed = number * struct.calcsize("=" + letter)
        if needed > len(value):
            (place,) = struct.unpack(order + pointer, value)
            value = _taken(file, place, needed, size)
        if tag == JPEG_TABLES:
            tags[tag] = value[:needed]
        elif letter == "s":
            tags[tag] = value[:needed].split(b"\0", 1)[0]
        else:
            tags[tag] = struct.unpack(f"{order}{number}{letter}", value[:needed])
    (following,) = struct.unpack_from(order + pointer, table, count * entry_size)
    return tags, following


def _taken(file: BinaryIO, offset: int, length: int, size: int) -> bytes:
    if offset + length > size:
        raise ValueError(f"it ends before byte {offset + length}")
    file.seek(offset)
    return file.read(length)
