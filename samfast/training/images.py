# SPDX-License-Identifier: Apache-2.0
"""One image or mask file to one array: decoding without silent conversions.

Every function raises ValueError (FileNotFoundError for a missing file) with one sentence that
names the file. Images come back as uint8 RGB, upright; masks as their stored values, upright.
"""

import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
# Only these decoders may run, whatever a file's first bytes ask for.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# What Pillow's decoders raise on damaged files, besides OSError.
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
)
_BOMB = (
    "{} has more than {} pixels, which Pillow takes for a decompression bomb; cut it into smaller "
    "images"
)
_HEADER_LOCK = threading.Lock()  # warning filters belong to the process, not to a thread


def read_image(path: Path) -> np.ndarray:
    """A photograph as RGB: uint8 (H, W, 3).

    Grey, palette and CMYK become RGB; transparency is laid over white; EXIF orientation is
    applied. Files with more than 8 bits a channel (16-bit, 32-bit integer, float) are scaled so
    that the 1st and 99th percentiles of this image's values become 0 and 255.
    """
    path = Path(path)
    image = _open(path)
    deep = _deep_array(path, image)
    if deep is not None:
        return _percentile_rgb(path, deep)
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        rgb = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        rgb = image.convert("RGB")
    else:
        raise ValueError(
            f"image {path} has the colour mode {image.mode}, which is not read; save it as RGB"
        )
    return np.ascontiguousarray(_upright(np.asarray(rgb), image))


def read_mask(path: Path) -> np.ndarray:
    """The values a mask file stores: (H, W), an integer or float type.

    Palette files give their indices, 1-bit files 0 and 1, JPEG files 0 and 255 (threshold 127,
    because JPEG does not keep exact values), RGB files their common channel.
    """
    path = Path(path)
    image = _open(path)
    if image.format in ("JPEG", "MPO"):
        grey = np.asarray(image.convert("L"))
        return _upright(np.where(grey > 127, 255, 0).astype(np.uint8), image)
    values = _deep_array(path, image)
    if values is None:
        if image.mode not in ("1", "L", "P", "PA", "LA", "RGB", "RGBA"):
            raise ValueError(
                f"mask {path} has the colour mode {image.mode}; save it with one channel"
            )
        values = np.asarray(image)
        if image.mode == "1":
            values = values.astype(np.uint8)
        values = _upright(values, image)
    if values.ndim == 3:
        values = _one_channel(path, values)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"mask {path} holds values that are not finite")
    return np.ascontiguousarray(values)


def read_values(path: Path, channels: int) -> np.ndarray:
    """Measured values of each pixel: float32 (H, W, channels); NaN says that there is none.

    Images of any number of bits, with the values they store, and .npy files of numbers, (H, W) for
    one channel or (H, W, channels).
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        values = _npy_array(path)
    else:
        image = _open(path)
        values = _deep_array(path, image)
        if values is None:
            if image.mode not in ("1", "L", "P", "RGB"):
                raise ValueError(
                    f"mask {path} has the colour mode {image.mode}; save it as grey or RGB"
                )
            values = _upright(np.asarray(image), image)
        if channels == 1 and values.ndim == 3:
            values = _one_channel(path, values)
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] != channels or 0 in values.shape:
        held = "an array of shape " + str(values.shape)
        if values.ndim == 3 and values.size:
            held = f"{values.shape[2]} channel{'s' if values.shape[2] > 1 else ''}"
        raise ValueError(f"mask {path} holds {held}, where {channels} are expected")
    values = np.ascontiguousarray(values, np.float32)
    if np.isinf(values).any():
        raise ValueError(f"mask {path} holds values that are infinite")
    return values


def _npy_array(path: Path) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be decoded: {_one_line(error)}") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
        raise ValueError(f"{path} holds no array of numbers")
    return values


def _open(path: Path) -> Image.Image:
    """Decode one file completely, or say in one sentence why not."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():  # a pipe or a device would block or never end
        raise ValueError(f"{path} is not a regular file")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which would fill truncated images with "
            "grey; leave it at False"
        )
    try:
        with _HEADER_LOCK, warnings.catch_warnings():
            # The limit is checked below; Pillow itself raises only from twice the limit on.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_FORMATS)
        with image:  # closes the file; what was loaded stays
            _check_pixels(path, image.width * image.height)
            frames = getattr(image, "n_frames", 1)
            # (Phones write MPO: a photograph followed by its previews.)
            if frames > 1 and image.format != "MPO":
                raise _Sentence(f"{path} holds {frames} frames; save the one you mean alone")
            image.load()
        return image
    except _Sentence as error:
        raise ValueError(str(error)) from None
    except Image.DecompressionBombError:
        raise ValueError(_BOMB.format(path, Image.MAX_IMAGE_PIXELS)) from None
    except UnidentifiedImageError:
        if path.suffix.lower() in (".tif", ".tiff"):
            return _tifffile_image(path)
        raise ValueError(f"{path} cannot be decoded: it is no {', '.join(_FORMATS)} file") from None
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be decoded: {_one_line(error)}") from None


class _Sentence(Exception):
    """Carries a finished sentence past the handlers for damaged files."""


def _check_pixels(path: Path, pixels: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise _Sentence(_BOMB.format(path, limit))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _upright(array: np.ndarray, image: Image.Image) -> np.ndarray:
    """Apply the EXIF orientation of a decoded image to its (H, W, ...) array."""
    return _orient(array, image.getexif().get(ExifTags.Base.Orientation, 1))


def _orient(array: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def _deep_array(path: Path, image: Image.Image) -> np.ndarray | None:
    """Values with more than 8 bits, upright: (H, W) or (H, W, C); None for 8-bit images."""
    if isinstance(image, _TiffArray):
        return image.values
    if image.mode.startswith("I") or image.mode == "F":
        values = _upright(np.asarray(image), image)
        if image.mode == "I" and image.format == "TIFF" and image.tag_v2.get(339, (1,))[0] == 1:
            values = values.view(np.uint32)  # Pillow has no unsigned 32-bit mode
        return values
    if image.format == "PNG" and _png_bits(path) == 16 and image.mode in ("RGB", "RGBA"):
        # Pillow keeps the high byte of each 16-bit sample. Unpacking the big-endian samples as
        # if they were little-endian yields the low byte.
        high = np.asarray(image).astype(np.uint16)
        with Image.open(path, formats=("PNG",)) as low:
            low.tile = [tile._replace(args=f"{image.mode};16L") for tile in low.tile]
            low.load()
            return _upright(high << 8 | np.asarray(low), image)
    if image.format == "PNG" and _png_bits(path) == 16:
        raise ValueError(
            f"{path} is a 16-bit PNG in the colour mode {image.mode}, which is not read; save it "
            "without transparency"
        )
    if image.format == "TIFF" and max(image.tag_v2.get(258, (8,))) > 8:
        return _tifffile_image(path).values
    return None


def _png_bits(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]  # the bit depth's place in the header chunk is fixed


class _TiffArray:
    """A TIFF that Pillow cannot represent: more than 8 bits in several channels, or float64."""

    mode = "array"
    format = "TIFF"

    def __init__(self, values: np.ndarray):
        self.values = values


def _tifffile_image(path: Path) -> _TiffArray:
    import tifffile  # comes with scikit-image

    try:
        with tifffile.TiffFile(path) as file:
            if len(file.pages) != 1:
                raise _Sentence(f"{path} holds {len(file.pages)} frames; save one alone")
            page = file.pages[0]
            _check_pixels(path, page.imagewidth * page.imagelength)
            values = page.asarray()
            axes = page.axes
            orientation = page.tags[274].value if 274 in page.tags else 1
    except _Sentence as error:
        raise ValueError(str(error)) from None
    except (*_DAMAGE, tifffile.TiffFileError) as error:
        raise ValueError(f"{path} cannot be decoded: {_one_line(error)}") from None
    if axes == "SYX":
        values, axes = np.moveaxis(values, 0, -1), "YXS"
    if axes not in ("YX", "YXS") or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"{path} holds an array of shape {values.shape} (axes {axes}); expected one, three "
            "or four channels"
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    return _TiffArray(_orient(values, int(orientation)))


def _percentile_rgb(path: Path, values: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3 or 4) of any number type -> uint8 (H, W, 3)."""
    colour = values[..., :3] if values.ndim == 3 else values[..., None]
    colour = colour.astype(np.float64)
    if not np.isfinite(colour).all():
        raise ValueError(f"image {path} holds values that are not finite")
    low, high = np.percentile(colour, (1, 99))
    if high <= low:  # nearly constant: use what range there is
        low, high = colour.min(), colour.max()
    scaled = np.clip((colour - low) / max(high - low, np.finfo(np.float64).tiny), 0, 1) * 255
    if values.ndim == 3 and values.shape[2] == 4:
        full = np.iinfo(values.dtype).max if values.dtype.kind in "ui" else 1.0
        alpha = values[..., 3:].astype(np.float64) / full
        scaled = alpha * scaled + (1 - alpha) * 255
    rgb = np.rint(scaled).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(rgb, (*rgb.shape[:2], 3)))


def _one_channel(path: Path, values: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (H, W), when the colour channels agree and alpha, if any, is constant."""
    colour = {1: 1, 2: 1, 3: 3, 4: 3}[values.shape[2]]
    alpha = values[..., colour:]
    if alpha.size and (alpha != alpha.flat[0]).any():
        raise ValueError(f"mask {path} varies in its alpha channel; save it with one channel")
    first = values[..., 0]
    if (values[..., :colour] != first[..., None]).any():
        raise ValueError(
            f"mask {path} is a colour image whose channels differ; save it with one channel"
        )
    return first
