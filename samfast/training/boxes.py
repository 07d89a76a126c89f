# SPDX-License-Identifier: Apache-2.0
"""Box prompts: one box per image, around all its foreground.

A box is (x0, y0, x1, y1), float64, in pixels. Its corners are the centres of its first and last
pixel, as in SAM's prompt encoder. If a mask holds several objects, the box is around all of them.
"""

from collections.abc import Sequence

import numpy as np


def foreground_box(mask: np.ndarray) -> np.ndarray:
    """bool (H, W) -> the box of its True pixels; of the whole image if there are none."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(rows):
        height, width = mask.shape
        return np.array([0, 0, width - 1, height - 1], np.float64)
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float64)


def resized_box(box: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """The box of an image of size ``before``, (height, width), resized to ``after``."""
    y, x = after[0] / before[0], after[1] / before[1]
    return box * np.array([x, y, x, y])


def jittered_box(
    box: np.ndarray, most: float, size: Sequence[int], rng: np.random.Generator
) -> np.ndarray:
    """Move each side by up to ``most`` pixels, uniformly, and not beyond the image.

    size: (height, width)   A small box whose sides pass one another stays a box, and no side is
    further than ``most`` from where it was in that case either.
    """
    x0, y0, x1, y1 = box + rng.uniform(-most, most, 4)
    height, width = size
    moved = [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
    return np.clip(moved, 0.0, [width, height, width, height])


def parsed_box(text: str) -> np.ndarray:
    """Parse a box ``x0,y0,x1,y1``; raise ValueError for other text."""
    try:
        box = np.array([float(number) for number in text.split(",")])
    except ValueError:
        box = np.empty(0)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"box is {text!r}; expected four numbers x0,y0,x1,y1 such as 10,20,110,90")
    x0, y0, x1, y1 = box
    if x0 > x1 or y0 > y1:
        raise ValueError(f"box is {text!r}; expected x0,y0,x1,y1 with x0 <= x1 and y0 <= y1")
    return box


def check_box(box: np.ndarray, size: Sequence[int], name: str) -> None:
    """ValueError when a box reaches beyond the image ``name`` of ``size`` (height, width)."""
    height, width = size
    if (box < 0).any() or (box > [width, height, width, height]).any():
        shown = ",".join(f"{number:g}" for number in box)
        raise ValueError(f"box {shown} is not inside image {name}, which is {width}x{height}")
