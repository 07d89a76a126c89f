# SPDX-License-Identifier: Apache-2.0
"""TIFF files packed by hand from lists of numbers, for tests of what reads them.

Written from the specification with struct alone: no NumPy, no other TIFF library, so that nothing
is shared with what is tested.
"""

import struct
import zlib
from typing import NamedTuple

NONE, LZW, DEFLATE, PACKBITS = 1, 5, 8, 32773


class How(NamedTuple):
    """The ways to lay out the same samples.

    tiled: in tiles of 16 x 16 pixels; else in strips of two rows   predictor: 1, 2 or 3
    """

    order: str = "<"
    big: bool = False
    planar: int = 1
    tiled: bool = False
    compression: int = NONE
    predictor: int = 1


class Picture(NamedTuple):
    """samples: rows of pixels of samples   bits, kind: of each, "u", "i" or "f"
    tags: further tags, by number: (type, values), values being integers or bytes
    """

    samples: list[list[list[float]]]
    bits: int
    kind: str
    tags: dict[int, tuple[int, object]]


PLAIN = How()


def write_tiff(path, pictures: list[Picture], how: How = PLAIN) -> None:
    """One page for each picture."""
    head, pointer = (16, "Q") if how.big else (8, "I")
    data = bytearray(head)
    places, ends = [], []
    for picture in pictures:
        tags = dict(picture.tags)
        segments = _segments(picture, how)
        offsets = []
        for segment in segments:
            offsets.append(len(data))
            data += segment + bytes(len(segment) % 2)
        height, width = len(picture.samples), len(picture.samples[0])
        count = len(picture.samples[0][0])
        tags |= {256: (4, [width]), 257: (4, [height]), 258: (3, [picture.bits] * count)}
        tags |= {259: (3, [how.compression]), 277: (3, [count]), 284: (3, [how.planar])}
        tags |= {339: (3, [{"u": 1, "i": 2, "f": 3}[picture.kind]] * count)}
        if how.predictor != 1:
            tags[317] = (3, [how.predictor])
        long = 16 if how.big else 4
        if how.tiled:
            tags |= {322: (3, [16]), 323: (3, [16]), 324: (long, offsets)}
            tags[325] = (long, [len(segment) for segment in segments])
        else:
            tags |= {278: (3, [2]), 273: (long, offsets)}
            tags[279] = (long, [len(segment) for segment in segments])
        entries = [_entry(tag, *tags[tag], data, how) for tag in sorted(tags)]
        places.append(len(data))
        data += struct.pack(how.order + ("Q" if how.big else "H"), len(entries))
        data += b"".join(entries)
        ends.append(len(data))
        data += bytes(struct.calcsize("=" + pointer))
    for end, place in zip(ends, [*places[1:], 0], strict=True):
        struct.pack_into(how.order + pointer, data, end, place)
    sign = b"II" if how.order == "<" else b"MM"
    header = struct.pack(how.order + "H", 43 if how.big else 42)
    header += struct.pack(how.order + "HH", 8, 0) if how.big else b""
    data[:head] = sign + header + struct.pack(how.order + pointer, places[0])
    path.write_bytes(data)


def _entry(tag: int, kind: int, values, data: bytearray, how: How) -> bytes:
    """One line of the directory; what does not fit in it goes to the end of the data."""
    if isinstance(values, bytes):
        packed, count = values, len(values)
    else:
        letter = {1: "B", 3: "H", 4: "I", 16: "Q"}[kind]
        packed, count = struct.pack(f"{how.order}{len(values)}{letter}", *values), len(values)
    room, number = (8, "Q") if how.big else (4, "I")
    if len(packed) > room:
        place = len(data)
        data += packed + bytes(len(packed) % 2)
        packed = struct.pack(how.order + number, place)
    return struct.pack(how.order + "HH" + number, tag, kind, count) + packed.ljust(room, b"\0")


def _segments(picture: Picture, how: How) -> list[bytes]:
    rows, count = picture.samples, len(picture.samples[0][0])
    planes = [[p] for p in range(count)] if how.planar == 2 else [list(range(count))]
    height, width = (16, 16) if how.tiled else (2, len(rows[0]))
    found = []
    for plane in planes:
        for top in range(0, len(rows), height):
            for left in range(0, len(rows[0]), width):
                part = [row[left : left + width] for row in rows[top : top + height]]
                if how.tiled:  # filled up
                    blank = [[0] * count] * width
                    part = [(row + blank)[:width] for row in part]
                    part += [blank] * (height - len(part))
                lines = [
                    _line([px[p] for px in row for p in plane], picture, len(plane), how)
                    for row in part
                ]
                found.append(_packed(b"".join(lines), how.compression))
    return found


def _line(values: list[float], picture: Picture, step: int, how: How) -> bytes:
    """The bytes of one row of samples; step: samples of each pixel."""
    bits, kind = picture.bits, picture.kind
    if kind == "f" or (bits >= 8 and bits % 8 == 0):
        letter = {"f": {16: "e", 32: "f", 64: "d"}, "u": {8: "B", 16: "H", 32: "I"}}
        letter["i"] = {8: "b", 16: "h", 32: "i"}
        code = letter[kind][bits]
        if how.predictor == 3:
            return _float_differences(struct.pack(f">{len(values)}{code}", *values), bits, step)
        if how.predictor == 2:
            whole = {8: "B", 16: "H", 32: "I", 64: "Q"}[bits]
            raw = struct.pack(f"={len(values)}{code}", *values)
            words = struct.unpack(f"={len(values)}{whole}", raw)
            before = (0,) * step + words
            less = [(w - b) % (1 << bits) for w, b in zip(words, before, strict=False)]
            return struct.pack(f"{how.order}{len(less)}{whole}", *less)
        return struct.pack(f"{how.order}{len(values)}{code}", *values)
    text = "".join(f"{int(value):0{bits}b}" for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def _float_differences(raw: bytes, bits: int, step: int) -> bytes:
    """The floats' first bytes, then their second ones and so on, as differences."""
    size = bits // 8
    apart = b"".join(raw[i::size] for i in range(size))
    before = bytes(step) + apart
    return bytes((byte - was) % 256 for byte, was in zip(apart, before, strict=False))


def _packed(data: bytes, compression: int) -> bytes:
    if compression == DEFLATE:
        return zlib.compress(data)
    if compression == PACKBITS:
        return _packbits(data)
    return _lzw(data) if compression == LZW else data


def _packbits(data: bytes) -> bytes:
    """Runs of at least three equal bytes, and what lies between them as it is."""
    out, i = bytearray(), 0
    while i < len(data):
        run = 1
        while i + run < len(data) and data[i + run] == data[i] and run < 128:
            run += 1
        if run > 2:
            out += bytes((257 - run, data[i]))
            i += run
            continue
        start = i
        while i < len(data) and i - start < 128 and data[i : i + 3] != data[i : i + 1] * 3:
            i += 1
        out += bytes((i - start - 1,)) + data[start:i]
    return bytes(out)


def _lzw(data: bytes) -> bytes:
    """Every byte as its own code; a clear code in time keeps all codes at nine bits."""
    codes = []
    for i in range(0, len(data), 200):
        codes += [256, *data[i : i + 200]]
    text = "".join(f"{code:09b}" for code in [*(codes or [256]), 257])
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
