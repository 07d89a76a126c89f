# SPDX-License-Identifier: Apache-2.0
"""Samples as a picture: which values become dark and bright, no data, palettes, inks, alpha."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from samfast.training.image_options import ImageOptions
from samfast.training.jpeg_blocks import Coding
from samfast.training.tiff_tags import Plan, Tags, image_plan, without_data

PERCENTILES = (1, 99)  # of the values with data: black and white of --range auto


@dataclass(frozen=True)
class Samples:
    """What a file stores.

    values: (H, W, samples), upright   tags: what they mean
    palette: uint8 (colours, 3) of palette files   hidden: bool (H, W), True without data
    lossy: whether the file's compression changes values   coding: how, where that is known
    """

    values: np.ndarray
    tags: Tags
    palette: np.ndarray | None = None
    hidden: np.ndarray | None = None
    lossy: bool = False
    coding: Coding | None = None


def picture(samples: Samples, options: ImageOptions) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 (H, W, 3), and the stored bands (H, W, 1 or 3) where these were scaled to it.

    Pixels without data are black; they take no part in the scaling. Raises ValueError, a phrase
    that follows the file's name.
    """
    tags = samples.tags
    plan = image_plan(tags, options.bands)
    values = samples.values[..., list(plan.bands)]
    missing = without_data(values, tags.no_data)
    if samples.hidden is not None:
        missing |= samples.hidden[..., None]
    if missing.all():
        raise ValueError("has no pixel with a value")
    alpha = None if plan.alpha is None else _alpha(samples.values[..., plan.alpha], tags)
    scaled = not plan.direct and plan.colours in ("grey", "rgb")
    if plan.colours == "palette":
        shown = _looked_up(values[..., 0], samples.palette)
    elif plan.colours == "cmyk":
        shown = _from_inks(values, tags)
    elif plan.direct:
        shown = values if tags.bits == 8 else np.rint(values * (255 / tags.top)).astype(np.uint8)
    else:
        if plan.premultiplied:
            assert alpha is not None, tags
            values = _divided(values, alpha)
        shown = _scaled(values, missing, alpha, options, tags)
    if plan.inverted:
        shown = 255 - shown
    if alpha is not None:
        shown = _over_white(shown, alpha, plan)
    rgb = np.array(np.broadcast_to(shown, (*shown.shape[:2], 3)))
    rgb[missing.all(2)] = 0
    return rgb, values if scaled else None


def limits(
    values: np.ndarray, counted: np.ndarray, options: ImageOptions, tags: Tags
) -> tuple[float, float]:
    """The values that become black and white. counted: which of the values have data."""
    if isinstance(options.range, tuple):
        return options.range
    present = values[counted].astype(np.float64)
    if options.range == "full":
        if tags.kind != "f":
            return float(-tags.top - 1 if tags.kind == "i" else 0), float(tags.top)
        low, high = present.min(), present.max()
        if low < 0 or high > 1:
            raise ValueError(
                f"holds floats from {low:g} to {high:g}, whose full range is 0 to 1; give "
                "--range LOW,HIGH"
            )
        return 0.0, 1.0
    low, high = np.percentile(present, PERCENTILES)
    if high <= low:  # nearly constant: use what range there is
        low, high = present.min(), present.max()
    return float(low), float(high)


def _scaled(
    values: np.ndarray,
    missing: np.ndarray,
    alpha: np.ndarray | None,
    options: ImageOptions,
    tags: Tags,
) -> np.ndarray:
    """(H, W, bands) of any number type -> uint8 of the same shape."""
    counted = ~missing if alpha is None else ~missing & (alpha > 0)[..., None]
    if not counted.any():
        raise ValueError("has no pixel with a value")
    if values.dtype.kind == "f" and np.isinf(values[counted]).any():
        raise ValueError(
            "holds values that are infinite; set its GDAL_NODATA tag to the value that marks "
            "missing data"
        )
    low, high = limits(values, counted, options, tags)
    width = max(high - low, np.finfo(np.float64).tiny)
    colour = np.where(missing, low, values).astype(np.float64)
    return np.rint(np.clip((colour - low) / width, 0, 1) * 255).astype(np.uint8)


def _alpha(stored: np.ndarray, tags: Tags) -> np.ndarray:
    """float64 (H, W) from 0 to 1; NaN lets nothing be seen."""
    alpha = stored.astype(np.float64) / (1 if tags.kind == "f" else tags.top)
    return np.clip(np.nan_to_num(alpha), 0, 1)


def _divided(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours that were multiplied by alpha, without it."""
    return values / np.where(alpha > 0, alpha, 1)[..., None]


def _over_white(shown: np.ndarray, alpha: np.ndarray, plan: Plan) -> np.ndarray:
    alpha = alpha[..., None]
    weighted = plan.direct and plan.premultiplied  # scaled ones were divided by alpha
    over = (shown if weighted else alpha * shown) + 255 * (1 - alpha)
    return np.clip(np.rint(over), 0, 255).astype(np.uint8)


def _looked_up(index: np.ndarray, palette: np.ndarray | None) -> np.ndarray:
    if palette is None or index.max(initial=0) >= len(palette):
        size = 0 if palette is None else len(palette)
        raise ValueError(
            f"holds the palette index {index.max(initial=0)}, but its palette has {size} colours"
        )
    return palette[index]


def _from_inks(values: np.ndarray, tags: Tags) -> np.ndarray:
    levels = values if tags.bits == 8 else np.rint(values / 257).astype(np.uint8)
    cmyk = Image.fromarray(np.ascontiguousarray(levels), mode="CMYK")
    return np.asarray(cmyk.convert("RGB"))
