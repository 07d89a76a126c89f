# SPDX-License-Identifier: Apache-2.0
"""What COCO calls a segmentation: polygons or run lengths, checked before they become pixels.

Phrases of ValueError follow "FILE, annotation ID ". pycocotools turns polygons to pixels; its C
code trusts what it gets, so that everything is checked before.
"""

from math import isfinite
from types import ModuleType
from typing import Any

import numpy as np

from samfast.training.rle import counts_of, shown

Segmentation = dict[str, Any] | tuple[np.ndarray, ...]  # an RLE, or polygons of x, y, x, y, ...
MOST_BORDER = 5_000_000  # pixels that one outline may be long; its memory grows with that


def mask_library() -> ModuleType:
    """pycocotools.mask; raises ImportError if it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        raise ImportError(
            'pycocotools, for polygons in COCO, is not installed: pip install "samfast[data]"'
        ) from None
    return mask


def is_number(value: Any) -> bool:
    """True for a finite number; False for True and False."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def checked_segmentation(segmentation: Any, size: tuple[int, int]) -> Segmentation:
    """A segmentation of an image (height, width), to be kept; ValueError, a phrase, for any other
    value."""
    if isinstance(segmentation, dict):
        counts = counts_of(segmentation, size)
        if isinstance(segmentation["counts"], list):
            return {"size": list(size), "counts": counts}
        return {"size": list(size), "counts": segmentation["counts"]}
    if segmentation in (None, []):
        raise ValueError(
            "has no segmentation, and a box is not an outline; export polygons or RLE, or remove "
            "the annotation"
        )
    if not isinstance(segmentation, list):
        raise ValueError(
            f"has the segmentation {shown(segmentation)}; expected a list of polygons, or an RLE"
        )
    kept = []
    for number, polygon in enumerate(segmentation, 1):
        where = "a polygon" if len(segmentation) == 1 else f"polygon {number}"
        kept.append(_checked_polygon(where, polygon, size))
    return tuple(kept)


def _checked_polygon(where: str, polygon: Any, size: tuple[int, int]) -> np.ndarray:
    """float64 x, y, x, y, ... of a list of numbers."""
    if not isinstance(polygon, list):
        raise ValueError(
            f"has the segmentation part {shown(polygon)}; expected a list [x, y, x, y, ...] "
            "for each part"
        )
    if not set(map(type, polygon)) <= {int, float} or not all(map(isfinite, polygon)):
        value = next(value for value in polygon if not is_number(value))
        raise ValueError(f"has {where} with {shown(value)}, which is not a finite number; fix it")
    if len(polygon) % 2 or len(polygon) < 6:
        raise ValueError(
            f"has {where} of {len(polygon)} numbers; expected an even number of at least 6 (three "
            "points)"
        )
    points = np.array(polygon, np.float64)
    height, width = size
    for name, values, side in (("x", points[::2], width), ("y", points[1::2], height)):
        far = values.min() if values.min() < -side else values.max()
        if not -side <= far <= 2 * side:
            raise ValueError(
                f"has {where} with {name} = {far:g}, far outside the image of {width}x{height}; "
                "annotate this image's own size, in pixels"
            )
    closed = np.append(points, points[:2]).reshape(-1, 2)
    border = np.hypot(*np.diff(closed, axis=0).T).sum()
    if border > MOST_BORDER:
        raise ValueError(
            f"has {where} whose outline is {border:.0f} pixels long, more than {MOST_BORDER}; "
            "simplify it, or export it as RLE"
        )
    return points


def rle_of(segmentation: Segmentation, size: tuple[int, int]) -> dict[str, Any]:
    """The RLE of a checked segmentation; the parts of several polygons together."""
    if isinstance(segmentation, dict):
        return segmentation
    library = mask_library()
    parts = library.frPyObjects([polygon.tolist() for polygon in segmentation], *size)
    return library.merge(parts)
