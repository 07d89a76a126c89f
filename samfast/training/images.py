# SPDX-License-Identifier: Apache-2.0
"""One image or mask file to one array: decoding without silent conversions.

Every function raises ValueError (FileNotFoundError for a missing file) with one sentence that
names the file. Images come back as uint8 RGB, upright; masks as their stored values, upright.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from samfast.training.foreground import Above, Foreground
from samfast.training.image_files import SUFFIXES, read_samples
from samfast.training.image_options import ImageOptions
from samfast.training.jpeg_blocks import Coding
from samfast.training.lossy import find_levels, named
from samfast.training.npy_files import read_mask_array, read_numbers
from samfast.training.scaling import Samples, picture
from samfast.training.stacks import Source, file_of, index_of, source_of
from samfast.training.tiff_tags import mask_bands, without_data

__all__ = [
    "SUFFIXES",
    "StoredMask",
    "load_image",
    "load_mask",
    "read_image",
    "read_mask",
    "read_values",
]

_AS_TAGGED = ImageOptions()
_COLOURLESS = 24  # steps by which the channels of a grey file differ at most after lossy coding


class StoredMask(NamedTuple):
    """The values of a mask file.

    values: (H, W)   lossy: whether its compression changes values, so that they were found again
    exact: False where an object is so small that its value is known roughly only
    blurred: two values that are so near for the compression that it may have moved pixels from one
    to the other; empty where it kept them apart
    """

    values: np.ndarray
    lossy: bool = False
    exact: bool = True
    blurred: tuple[int, ...] = ()


def read_image(path: Source, options: ImageOptions = _AS_TAGGED) -> np.ndarray:
    """Read an image as RGB: uint8 (H, W, 3).

    Grey, palette and CMYK become RGB; transparency is laid over white; the orientation is applied;
    pixels without data are black. Files with more than 8 bits a channel (16-bit, 32-bit integer,
    float) are scaled so that the 1st and 99th percentiles of this image's values become 0 and 255,
    unless the options say other values. Of TIFF files, the tags decide all this.
    """
    return load_image(path, options)[0]


def load_image(
    path: Source, options: ImageOptions = _AS_TAGGED
) -> tuple[np.ndarray, np.ndarray | None]:
    """``read_image``, and the stored values (H, W, 1 or 3) where the file's were scaled to it."""
    path = source_of(path)
    samples = read_samples(path, as_image=True)
    try:
        return picture(samples, options)
    except ValueError as error:
        raise ValueError(f"image {path} {error}") from None


def read_mask(
    path: Source, foreground: Foreground = None, also: tuple[float, ...] = ()
) -> np.ndarray:
    """Read the values of a mask file: (H, W), an integer or float type.

    Palette files give their indices (GIF without colours its greys), 1-bit files and bools 0 and
    1, RGB files their common channel. JPEG and lossy WebP do not keep exact values: of two values,
    every pixel gets the nearer one (``load_mask`` says where these are so near that pixels may have
    changed sides).
    foreground: the rule that is applied next, which only lossy files need; under a threshold, they
    give what they decode to   also: values besides the foreground's that mean something
    """
    return load_mask(path, foreground, also=also).values


def load_mask(
    path: Source,
    foreground: Foreground = None,
    *,
    also: tuple[float, ...] = (),
    labels: bool = False,
) -> StoredMask:
    """``read_mask`` with what is known of the values.

    also: values besides the foreground's that mean something
    labels: every value is a class of its own, which no lossy file can hold
    """
    path = source_of(path)
    if path.suffix.lower() == ".npy":
        return StoredMask(read_mask_array(file_of(path), index_of(path)))
    samples = read_samples(path, as_image=False)
    if samples.lossy and samples.tags.bits == 8 and samples.values.shape[2] > 1:
        samples = _grey(path, samples)
    values = one_channel(path, samples)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"mask {path} holds values that are not finite")
    values = np.ascontiguousarray(values)
    if not samples.lossy:
        return StoredMask(values)
    if labels:
        raise ValueError(
            f"mask {path} uses lossy compression, which changes class numbers; save it as PNG"
        )
    return _found_again(path, values, samples.coding, foreground, also)


def _found_again(
    path: Source,
    grey: np.ndarray,
    coding: Coding | None,
    foreground: Foreground,
    also: tuple[float, ...],
) -> StoredMask:
    """The values that a lossy mask had."""
    above = isinstance(foreground, Above)
    if isinstance(foreground, Above) and not foreground.any:
        return StoredMask(grey, lossy=True)
    levels = find_levels(grey, coding) if grey.dtype == np.uint8 else None
    if levels is None and foreground is None:
        return StoredMask(grey, lossy=True)  # more than two values, which the caller refuses
    count = 0 if levels is None else len(levels.values)
    if levels is None or count == 0 or (count > 2 and not above and foreground is not None):
        held = f"its {count} values blend" if count else "its values cannot be told apart"
        advice = "save it as PNG, or give --threshold T (every value above T)"
        raise ValueError(f"mask {path} lost values to compression: {held}; {advice}")
    wanted = foreground if isinstance(foreground, tuple) else ()
    levels = named(levels, (*wanted, *also))
    return StoredMask(
        levels.nearest(grey),
        lossy=True,
        exact=levels.exact,
        blurred=levels.values if levels.blurred else (),
    )


def _grey(path: Source, samples: Samples) -> Samples:
    """Lossy RGB as one channel; ValueError for colours."""
    bands = list(mask_bands(samples.tags))
    colour = np.ascontiguousarray(samples.values[..., bands])
    if len(bands) == 1:
        return samples
    if int((colour.max(2).astype(int) - colour.min(2)).max(initial=0)) > _COLOURLESS:
        raise ValueError(_coloured(path))
    values = samples.values.copy()
    values[..., bands] = np.asarray(Image.fromarray(colour).convert("L"))[..., None]
    return replace(samples, values=values)


def _coloured(path: Source) -> str:
    return f"mask {path} is a colour image whose channels differ; save it with one channel"


def read_values(path: Source, channels: int) -> np.ndarray:
    """Measured values of each pixel: float32 (H, W, channels); NaN says that there is none.

    Images of any number of bits, with the values they store (NaN where GDAL_NODATA or a
    transparency mask says that there is none), and .npy files of numbers, (H, W) for one channel or
    (H, W, channels).
    """
    path = source_of(path)
    if path.suffix.lower() == ".npy":
        values = read_numbers(file_of(path), index_of(path), 2 if channels == 1 else 3)
    else:
        samples = read_samples(path, as_image=False)
        values = samples.values
        missing = without_data(values, samples.tags.no_data)
        if samples.hidden is not None:
            missing |= samples.hidden[..., None]
        if channels == 1 and values.shape[2] > 1:
            values, missing = one_channel(path, samples), missing[..., 0]
        if missing.any():
            values = np.where(missing, np.nan, values)
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


def one_channel(path: Source, samples: Samples) -> np.ndarray:
    """(H, W), when the colour channels agree and all others are constant."""
    try:
        bands = mask_bands(samples.tags)
    except ValueError as error:
        raise ValueError(f"mask {path} {error}") from None
    values = samples.values
    for i in range(values.shape[2]):
        if i not in bands and (values[..., i] != values[0, 0, i]).any():
            what = "its alpha channel" if i == samples.tags.alpha else f"its channel {i + 1}"
            raise ValueError(f"mask {path} varies in {what}; save it with one channel")
    first = values[..., bands[0]]
    if any((values[..., i] != first).any() for i in bands[1:]):
        raise ValueError(_coloured(path))
    return first
