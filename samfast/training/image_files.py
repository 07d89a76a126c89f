# SPDX-License-Identifier: Apache-2.0
"""Read the samples of an image file, upright, with the meaning that its tags give them.

Raises ValueError (FileNotFoundError for a missing file) with one sentence that names the file.
"""

import lzma
import struct
import threading
import warnings
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from samfast.training import tiff_pages as t
from samfast.training.jpeg_blocks import Coding, coding_of
from samfast.training.orientation import upright
from samfast.training.scaling import Samples
from samfast.training.stacks import Slice, Source, array_samples, file_of
from samfast.training.tiff_pages import Page, read_pages
from samfast.training.tiff_samples import coding_of_page, is_lossy, sample_type, stored_samples
from samfast.training.tiff_tags import (
    BLACK_IS_ZERO,
    PAGE_MASK,
    PALETTE,
    REDUCED,
    RGB,
    UNASSOCIATED,
    YCBCR,
    Tags,
    full_pages,
    no_data_number,
)

MASK_ONLY = (".gif", ".npy")  # of masks, besides SUFFIXES
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
# Only these decoders may run, whatever a file's first bytes ask for; TIFF is read by its tags.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
# What decoders raise on damaged files, besides OSError.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    Image.DecompressionBombError,
)
_BOMB = (
    "{} has more than {} pixels, Pillow's limit against decompression bombs; cut it into smaller "
    "images"
)
_FRAMES = "{} holds {} frames; save the one you mean to a file of its own"
_TRANSPARENT = ("LA", "PA", "La", "RGBA", "RGBa")
_HEADER_LOCK = threading.Lock()  # warning filters belong to the process, not to a thread


class _Sentence(Exception):
    """Carries a finished sentence past the handlers for damaged files."""


def read_samples(path: Source, *, as_image: bool) -> Samples:
    """What a file, or one slice of it, stores. as_image: palettes and transparency of other files
    than TIFF become colours and alpha; else a palette's indices are the values."""
    file = file_of(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist")
    if not file.is_file():  # a pipe or a device would block or never end
        raise ValueError(f"{file} is not a regular file")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which would fill truncated images with "
            "grey; leave it at False"
        )
    if as_image and file.suffix.lower() == ".npy":
        if not isinstance(path, Slice):
            raise ValueError(f"image {path} is an array; give --stacks to read arrays")
        return array_samples(path)
    try:
        with file.open("rb") as opened:
            is_tiff = opened.read(4) in t.SIGNATURES
        if is_tiff:
            return _tiff(path)
        return _other(file, as_image)
    except _Sentence as error:
        raise ValueError(str(error)) from None
    except UnidentifiedImageError:
        formats = ", ".join((*_formats(file, as_image), "TIFF"))
        raise ValueError(f"{path} cannot be decoded: it is not a {formats} file") from None
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be decoded: {_one_line(error)}") from None


def _tiff(source: Source) -> Samples:
    path = file_of(source)
    if isinstance(source, Slice):
        about = path.stat()
        pages = _pages_of_stack(path, about.st_ino, about.st_size, about.st_mtime_ns)
    else:
        with path.open("rb") as file:
            pages = read_pages(file)
    kinds = [page.kind for page in pages]
    full = full_pages(kinds)
    at, around = _pages_of(source, pages, full)
    page = pages[at]
    size = page.number(t.HEIGHT), page.number(t.WIDTH)
    tags = _tags_of(source, page)
    _check_pixels(source, size[0] * size[1] * max(1, tags.samples // 16))
    values = stored_samples(path, pages, at, tags.no_data)
    if values.shape[2] != tags.samples:
        raise ValueError(f"it holds {values.shape[2]} samples; expected {tags.samples}")
    hidden = None
    for i in around:
        own = pages[i].number(t.HEIGHT), pages[i].number(t.WIDTH)
        if i != at and kinds[i] & PAGE_MASK and not kinds[i] & REDUCED and own == size:
            hidden = (stored_samples(path, pages, i, None) == 0).all(2)
    turn = page.number(t.ORIENTATION, 1)
    return Samples(
        values=np.ascontiguousarray(upright(values, turn)),
        tags=tags,
        palette=_palette(page, tags) if tags.photometric == PALETTE else None,
        hidden=None if hidden is None else np.ascontiguousarray(upright(hidden, turn)),
        lossy=is_lossy(path, page),
        coding=coding_of_page(page),
    )


@lru_cache(maxsize=2)  # an image and its mask, whose slices often follow each other
def _pages_of_stack(path: Path, *_: int) -> list[Page]:
    """The pages of a file, remembered while the further numbers say that it is the same."""
    with path.open("rb") as file:
        return read_pages(file)


def _pages_of(source: Source, pages: list[Page], full: list[int]) -> tuple[int, range]:
    """The page of an image, and the pages among which its transparency mask may be."""
    if not isinstance(source, Slice):
        if len(full) > 1:
            advice = ", or give --stacks, which reads each as an image"
            raise _Sentence(_FRAMES.format(source, len(full)) + advice)
        if _has_hidden_frames(pages[full[0]]):
            raise _Sentence(
                f"{source} holds several frames behind one page, which are not read; save each as "
                "a page, in BigTIFF"
            )
        return full[0], range(len(pages))
    if source.index >= len(full):
        raise ValueError(f"it has {len(full)} slices, and {source.index} is not one of them")
    after = full[source.index + 1 :]
    return full[source.index], range(full[source.index], after[0] if after else len(pages))


def _tags_of(path: Source, page: Page) -> Tags:
    samples, bits, kind = sample_type(page)
    photometric = page.number(t.PHOTOMETRIC) if t.PHOTOMETRIC in page.tags else None
    if photometric == YCBCR:  # decoders give its colours, or its luma only
        photometric = RGB if samples > 1 else BLACK_IS_ZERO
        if page.number(t.COMPRESSION, 1) not in (6, 7):
            raise _Sentence(f"{path} holds YCbCr without JPEG compression; save it as RGB")
    try:
        no_data = no_data_number(page.text(t.NO_DATA))
    except ValueError as error:
        raise _Sentence(f"{path} {error}") from None
    return Tags(
        samples=samples,
        bits=bits,
        kind=kind,
        photometric=photometric,
        extra=page.numbers(t.EXTRA, ()) if page.tags.get(t.EXTRA) else (),
        no_data=no_data,
        ink_set=page.number(t.INK_SET, 1),
    )


def _has_hidden_frames(page: Page) -> bool:
    """Whether frames lie behind a single page, as ImageJ and tifffile write large stacks."""
    text = page.text(t.DESCRIPTION)
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if text.startswith("ImageJ=") and lines.get("images", "").isdecimal():
        return int(lines["images"]) > 1
    return text.startswith("{") and '"truncated": true' in text


def _palette(page: Page, tags: Tags) -> np.ndarray:
    """uint8 (colours, 3) of a ColorMap, which has 16 bits."""
    colours = np.asarray(page.numbers(t.COLOURS))
    if len(colours) != 3 << tags.bits:
        raise ValueError(f"its palette has {len(colours)} numbers; expected {3 << tags.bits}")
    return (colours.reshape(3, -1).T >> 8).astype(np.uint8)


def _formats(path: Path, as_image: bool) -> tuple[str, ...]:
    """The formats that Pillow may decode a file as; GIF for masks of that name."""
    return (*_FORMATS, "GIF") if not as_image and path.suffix.lower() == ".gif" else _FORMATS


def _other(path: Path, as_image: bool) -> Samples:
    """What Pillow decodes: PNG, JPEG, BMP and WebP, of masks GIF."""
    try:
        with _HEADER_LOCK, warnings.catch_warnings():
            # The limit is checked below; Pillow itself raises only from twice the limit on.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_formats(path, as_image))
    except Image.DecompressionBombError:
        raise _Sentence(_BOMB.format(path, Image.MAX_IMAGE_PIXELS)) from None
    with image:  # closes the file; what was loaded stays
        _check_pixels(path, image.width * image.height)
        frames = getattr(image, "n_frames", 1)
        # (Phones write MPO: a photograph followed by its previews.)
        if frames > 1 and image.format != "MPO":
            raise _Sentence(_FRAMES.format(path, frames))
        image.load()
    lossy = image.format in ("JPEG", "MPO") or (image.format == "WEBP" and not _is_vp8l(path))
    coding = _coding(image) if lossy and image.format != "WEBP" else None
    deep = _png_bits(path) == 16 if image.format == "PNG" else False
    if deep:
        values, tags = _deep_png(path, image), _tags_of_mode(image.mode, 16)
        if as_image and (clear := image.info.get("transparency")) is not None:
            seen = (values != clear).any(2, keepdims=True).astype(values.dtype)
            values = np.concatenate([values, seen * values.dtype.type(tags.top)], 2)
            tags = replace(tags, samples=tags.samples + 1, extra=(UNASSOCIATED,))
        return Samples(_upright(values, image), tags)
    if as_image:
        if image.mode in _TRANSPARENT or "transparency" in image.info:
            image = _converted(image, "RGBA")
        elif image.mode in ("P", "CMYK", "YCbCr"):
            image = _converted(image, "RGB")
    elif lossy and image.mode in ("CMYK", "YCbCr"):
        image = _converted(image, "RGB")
    known = ("1", "L", "RGB", "RGBA") if as_image else ("1", "L", "P", "PA", "LA", "RGB", "RGBA")
    if image.mode not in known:
        what, advice = ("image", "save it as RGB") if as_image else ("mask", "save it as grey")
        raise _Sentence(
            f"{what} {path} has the colour mode {image.mode}, which is not read; {advice}"
        )
    values, bits = np.asarray(image), 1 if image.mode == "1" else 8
    if image.format == "GIF" and image.mode == "P":
        values = _greys(values, image)
    if image.format == "PNG" and image.mode == "L" and not as_image:
        values = values // (255 // ((1 << min(8, _png_bits(path))) - 1))  # 2 and 4 bits: as stored
    values = _upright(values.astype(np.uint8), image)
    tags = _tags_of_mode(image.mode, bits)
    return Samples(_with_samples(values), tags, lossy=lossy, coding=coding)


def _greys(indices: np.ndarray, image: Image.Image) -> np.ndarray:
    """The greys of a palette without colours, whose order means nothing; else the indices."""
    colours = np.zeros((256, 3), np.uint8)
    palette = np.asarray(image.getpalette() or [], np.uint8).reshape(-1, 3)
    colours[: len(palette)] = palette
    used = colours[np.unique(indices)]
    return colours[indices, 0] if (used == used[:, :1]).all() else indices


def _coding(image: Image.Image) -> Coding | None:
    """How a grey or RGB JPEG was compressed."""
    tables, layers = getattr(image, "quantization", {}), getattr(image, "layer", [])
    if image.mode not in ("L", "RGB") or not layers:
        return None
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    return coding_of(tables.get(layers[0][3]), turn)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in another mode; it keeps its format and its orientation."""
    converted = image.convert(mode)
    converted.format = image.format
    return converted


def _tags_of_mode(mode: str, bits: int) -> Tags:
    """What the tags of a TIFF would say of Pillow's mode."""
    alpha = mode in ("LA", "PA", "RGBA")
    colours = 3 if mode in ("RGB", "RGBA") else 1
    photometric = RGB if colours == 3 else BLACK_IS_ZERO
    return Tags(colours + alpha, bits, "u", photometric, (2,) if alpha else ())


def _with_samples(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.reshape(*values.shape[:2], -1))


def _deep_png(path: Path, image: Image.Image) -> np.ndarray:
    """uint16 (H, W, samples) of a PNG with 16 bits, not turned."""
    if image.mode.startswith("I"):
        return _with_samples(np.asarray(image).astype(np.uint16))
    if image.mode not in ("RGB", "RGBA"):
        raise _Sentence(
            f"{path} is a 16-bit PNG in the colour mode {image.mode}, which is not read; save it "
            "without transparency"
        )
    # Pillow keeps the high byte of each 16-bit sample. Unpacking the big-endian samples as if
    # they were little-endian yields the low byte.
    high = np.asarray(image).astype(np.uint16)
    with Image.open(path, formats=("PNG",)) as low:
        low.tile = [tile._replace(args=f"{image.mode};16L") for tile in low.tile]
        low.load()
        return high << 8 | np.asarray(low)


def _png_bits(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]  # the bit depth's place in the header chunk is fixed


def _is_vp8l(path: Path) -> bool:
    """Whether a WebP file is lossless: its picture is in a chunk called VP8L."""
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            if head[:4] in (b"VP8 ", b"VP8L"):
                return head[:4] == b"VP8L"
            size = int.from_bytes(head[4:], "little")
            file.seek(size + size % 2, 1)
    return False


def _check_pixels(path: Source, pixels: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise _Sentence(_BOMB.format(path, limit))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _upright(array: np.ndarray, image: Image.Image) -> np.ndarray:
    """Apply the EXIF orientation of a decoded image to its (H, W, ...) array."""
    turned = upright(array, image.getexif().get(ExifTags.Base.Orientation, 1))
    return np.ascontiguousarray(turned)
