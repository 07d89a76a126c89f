# SPDX-License-Identifier: Apache-2.0
"""The samples of a TIFF page as they are stored: strips, tiles, planes, codecs, bit depths.

Codecs that work on bytes are undone here, in every depth and layout. Pillow decodes those that
work on pictures (JPEG, WebP, CCITT), and tifffile what it can of the rest. ValueError says, in a
phrase after "FILE cannot be decoded: ", what is damaged or not read.
"""

import io
import lzma
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from samfast.training import tiff_pages as t
from samfast.training.jpeg_blocks import MOST_SIDE, Coding, coding_of, first_steps
from samfast.training.orientation import as_stored
from samfast.training.tiff_pages import Page
from samfast.training.tiff_tags import MASK, WHITE_IS_ZERO

NONE, CCITT, LZW, OLD_JPEG, JPEG, DEFLATE = 1, (2, 3, 4), 5, 6, 7, (8, 32946)
PACKBITS, LZMA, ZSTD, WEBP = 32773, 34925, 50000, 50001
_PILLOW = (*CCITT, OLD_JPEG, JPEG, WEBP)
_LIBTIFF = (LZW, PACKBITS, ZSTD)
_LOSSLESS = (NONE, *CCITT, LZW, *DEFLATE, PACKBITS, LZMA, ZSTD)


def sample_type(page: Page) -> tuple[int, int, str]:
    """(samples of each pixel, bits of each, "u", "i" or "f"); raises ValueError if they differ."""
    samples = page.number(t.SAMPLES, 1)
    bits, formats = page.numbers(t.BITS, (1,)), page.numbers(t.FORMAT, (1,))
    if len(set(bits)) > 1 or len(set(formats)) > 1:
        raise ValueError(f"its samples have different types ({bits} bits, formats {formats})")
    kind = {1: "u", 2: "i", 3: "f", 4: "u"}.get(formats[0], "")
    whole = bits[0] in (8, 16, 32, 64)
    known = {"u": whole or 0 < bits[0] < 16, "i": whole, "f": bits[0] in (16, 32, 64)}
    if samples < 1 or not known.get(kind, False):
        raise ValueError(f"{samples} samples of {bits[0]} bits, format {formats[0]}, are not read")
    return samples, bits[0], kind


def is_lossy(path: Path, page: Page) -> bool:
    """Whether the codec may have changed the values."""
    codec = page.number(t.COMPRESSION, 1)
    if codec != WEBP:
        return codec not in _LOSSLESS
    with path.open("rb") as file:
        file.seek(page.number(t.OFFSETS, page.numbers(t.TILE_OFFSETS, (0,))[0]))
        return file.read(16)[12:16] != b"VP8L"


def coding_of_page(page: Page) -> Coding | None:
    """How a page in JPEG was compressed, where its tables are in its tags."""
    tables = page.tags.get(t.JPEG_TABLES)
    if page.number(t.COMPRESSION, 1) != JPEG or not isinstance(tables, bytes):
        return None
    if max(page.number(t.HEIGHT), page.number(t.WIDTH)) > MOST_SIDE:
        return None
    return coding_of(first_steps(tables), page.number(t.ORIENTATION, 1))


def stored_samples(path: Path, pages: list[Page], index: int, fill: float | None) -> np.ndarray:
    """(H, W, samples) of one page, not turned. fill: what parts that the file leaves out hold."""
    page = pages[index]
    codec = page.number(t.COMPRESSION, 1)
    if page.number(t.DEPTH, 1) != 1:
        raise ValueError("it is a volume; save its slices")
    if codec in _PILLOW:
        return _by_pillow(path, page, index)
    if codec not in (NONE, LZMA, *DEFLATE, *_LIBTIFF):
        return _by_tifffile(path, index, codec)
    with path.open("rb") as file:
        return _Layout(page, fill).read(file)


class _Layout:
    """Where the strips or tiles of a page lie, and what is in them."""

    def __init__(self, page: Page, fill: float | None):
        self.page = page
        self.samples, self.bits, self.kind = sample_type(page)
        self.height, self.width = page.number(t.HEIGHT), page.number(t.WIDTH)
        self.codec = page.number(t.COMPRESSION, 1)
        self.predictor = page.number(t.PREDICTOR, 1)
        self.planes = self.samples if page.number(t.PLANAR, 1) == 2 else 1
        self.in_one = self.samples // self.planes  # samples of each pixel of a segment
        self.tiled = t.TILE_WIDTH in page.tags
        if self.tiled:
            self.part = page.number(t.TILE_HEIGHT), page.number(t.TILE_WIDTH)
            names = t.TILE_OFFSETS, t.TILE_COUNTS
        else:
            self.part = min(page.number(t.ROWS, self.height), self.height), self.width
            names = t.OFFSETS, t.COUNTS
        if min(*self.part, self.height, self.width) < 1:
            raise ValueError("its size is 0")
        self.offsets, self.counts = page.numbers(names[0]), page.numbers(names[1], ())
        self.across = -(-self.width // self.part[1])
        self.in_plane = -(-self.height // self.part[0]) * self.across
        expected = self.planes * self.in_plane
        if not self.counts and expected == 1 and self.codec == NONE:  # old writers leave them out
            self.counts = (self.height * self._row_bytes(self.width),)
        if len(self.offsets) != expected or len(self.counts) != expected:
            raise ValueError(
                f"it has {len(self.offsets)} segments with {len(self.counts)} lengths; expected "
                f"{expected}"
            )
        if page.number(t.FILL_ORDER, 1) != 1 and self.codec != NONE:
            raise ValueError("compressed data in FillOrder 2 is not read")
        missing = 0 if fill is None else fill
        whole = self.kind == "f" or float(missing).is_integer()
        self.fill = missing if whole else 0

    def _row_bytes(self, width: int) -> int:
        return -(-width * self.in_one * self.bits // 8)

    def read(self, file: BinaryIO) -> np.ndarray:
        shape = (self.height, self.width, self.samples)
        size = 8 if self.bits < 8 else self.bits if self.bits in (8, 16, 32, 64) else 16
        out = np.zeros(shape, np.dtype(f"{self.kind}{size // 8}"))
        end = file.seek(0, 2)
        for where, offset, count, rows in self._segments():
            if offset == 0 or count == 0:  # sparse: left out of the file
                out[where] = self.fill
                continue
            if offset + count > end:
                raise ValueError(f"it ends before byte {offset + count}")
            file.seek(offset)
            values = self._values(file.read(count), rows)
            target = out[where]
            target[...] = values[: target.shape[0], : target.shape[1]]
        return out

    def _segments(self) -> Iterator[tuple[tuple[slice, slice, slice], int, int, int]]:
        """(place in the page, offset, bytes, rows) of every strip or tile."""
        height, width = self.part
        for i, (offset, count) in enumerate(zip(self.offsets, self.counts, strict=True)):
            plane, number = divmod(i, self.in_plane)
            y, x = divmod(number, self.across)
            rows = height if self.tiled else min(height, self.height - y * height)
            bands = slice(plane, plane + 1) if self.planes > 1 else slice(None)
            place = slice(y * height, (y + 1) * height), slice(x * width, (x + 1) * width), bands
            yield place, offset, count, rows

    def _values(self, data: bytes, rows: int) -> np.ndarray:
        """(rows, columns, samples) of one strip or tile."""
        row = self._row_bytes(self.part[1])
        data = _unpacked(self.codec, data, rows, row)
        if len(data) < rows * row:
            raise ValueError(f"a segment holds {len(data)} bytes; expected {rows * row}")
        table = np.frombuffer(data, np.uint8, rows * row).reshape(rows, row)
        if self.page.number(t.FILL_ORDER, 1) == 2:  # of the bits in every byte, at any depth
            table = np.packbits(np.unpackbits(table, axis=1, bitorder="little"), axis=1)
        shape = (rows, self.part[1], self.in_one)
        if self.predictor == 3:
            return self._from_float_predictor(table).reshape(shape)
        if self.bits not in (8, 16, 32, 64):
            if self.predictor != 1:
                raise ValueError(f"predictor {self.predictor} with {self.bits} bits is not read")
            return self._from_bits(table).reshape(shape)
        letter = "u" if self.predictor == 2 else self.kind
        values = table.view(f"{self.page.order}{letter}{self.bits // 8}").reshape(shape)
        if self.predictor == 2:
            plain = np.dtype(f"u{self.bits // 8}")
            values = np.cumsum(values, axis=1, dtype=plain).view(f"{self.kind}{self.bits // 8}")
        elif self.predictor != 1:
            raise ValueError(f"predictor {self.predictor} is not read")
        return values

    def _from_bits(self, table: np.ndarray) -> np.ndarray:
        """Rows of samples that are packed without gaps, the highest bit first."""
        count = self.part[1] * self.in_one
        bits = np.unpackbits(table, axis=1)[:, : count * self.bits]
        weights = (1 << np.arange(self.bits)[::-1]).astype(np.uint16)
        return bits.reshape(-1, count, self.bits) @ weights

    def _from_float_predictor(self, table: np.ndarray) -> np.ndarray:
        """Rows of differences between bytes, the floats' highest bytes first."""
        if self.kind != "f":
            raise ValueError("predictor 3 is for floats only")
        steps = table.reshape(len(table), -1, self.in_one)
        whole = np.cumsum(steps, axis=1, dtype=np.uint8).reshape(len(table), self.bits // 8, -1)
        return np.ascontiguousarray(whole.transpose(0, 2, 1)).view(f">f{self.bits // 8}")


def _unpacked(codec: int, data: bytes, rows: int, row: int) -> bytes:
    """The bytes of one strip or tile, at most as many as it needs."""
    if codec in DEFLATE:
        return zlib.decompressobj().decompress(data, rows * row)
    if codec == LZMA:
        return lzma.LZMADecompressor().decompress(data, rows * row)
    if codec in _LIBTIFF:
        return _by_libtiff(codec, data, rows, row)
    return data


def _by_libtiff(codec: int, data: bytes, rows: int, row: int) -> bytes:
    """Bytes through libtiff: the same data as the only strip of a grey 8-bit TIFF."""
    if Image.MAX_IMAGE_PIXELS is not None and rows * row > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"a segment unpacks to {rows * row} bytes, more than Pillow's limit of "
            f"{Image.MAX_IMAGE_PIXELS}; save it in strips or tiles"
        )
    size = {256: row, 257: rows, 258: 8, 259: codec, 262: 1, 273: 0, 277: 1, 278: rows}
    size[279] = len(data)
    size[273] = 8 + 2 + 12 * len(size) + 4
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in size.items())
    header = struct.pack("<2sHIH", b"II", 42, 8, len(size)) + table + bytes(4)
    with Image.open(io.BytesIO(header + data), formats=("TIFF",)) as image:
        return image.tobytes()


def _by_pillow(path: Path, page: Page, index: int) -> np.ndarray:
    """A page whose codec works on pictures."""
    with Image.open(path, formats=("TIFF",)) as image:
        image.seek(index)
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != turn
        mode = image.mode
        values = np.asarray(image.convert("RGB") if mode == "YCbCr" else image)
    if turned:  # by Pillow
        values = as_stored(values, turn)
    if mode not in ("1", "L", "P", "RGB", "YCbCr", "CMYK"):
        raise ValueError(
            f"codec {page.number(t.COMPRESSION)} with {page.number(t.SAMPLES, 1)} samples of "
            f"{page.number(t.BITS, 1)} bits is not read; save it without alpha, or with Deflate"
        )
    values = values.astype(np.uint8).reshape(*values.shape[:2], -1)
    if values.shape[2] != page.number(t.SAMPLES, 1):
        raise ValueError(
            f"codec {page.number(t.COMPRESSION)} gives {values.shape[2]} of "
            f"{page.number(t.SAMPLES, 1)} samples"
        )
    if mode in ("1", "L") and page.number(t.PHOTOMETRIC, MASK) == WHITE_IS_ZERO:
        values = (1 if mode == "1" else 255) - values  # Pillow turned them round
    return values


def _by_tifffile(path: Path, index: int, codec: int) -> np.ndarray:
    """A page with a codec that needs tifffile's own, optional libraries."""
    try:
        import tifffile  # comes with scikit-image

        with tifffile.TiffFile(path) as file:
            page = file.pages[index]
            values, axes = page.asarray(), page.axes
    except Exception as error:  # of any kind: other libraries decode
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"codec {codec} is not read ({reason}); save it without compression or with Deflate"
        ) from None
    if axes == "YX":
        return values[..., None]
    if axes not in ("YXS", "SYX"):
        raise ValueError(f"axes {axes} are not read")
    return values if axes == "YXS" else np.moveaxis(values, 0, -1)
