# SPDX-License-Identifier: Apache-2.0
"""Point prompts: one click for each image, on its foreground.

A point is (x, y, label), float64, x and y in pixels, label 1 on the foreground and 0 beside it.
"""

from collections.abc import Sequence

import numpy as np


def clicked_point(mask: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """bool (H, W) -> a point of its True pixels: any of them with rng, else the deepest inside.

    Without any, the image's centre, of label 0.
    """
    height, width = mask.shape
    if not mask.any():
        return np.array([(width - 1) / 2, (height - 1) / 2, 0.0])
    if rng is None:
        return np.array([*_deepest(mask), 1.0])
    inside = np.flatnonzero(mask)
    y, x = divmod(int(inside[rng.integers(len(inside))]), width)
    return np.array([x, y, 1.0])


def _deepest(mask: np.ndarray) -> tuple[float, float]:
    """The centre of the largest square of True pixels, of several the first line by line."""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    sums[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)

    def squares(side: int) -> np.ndarray:
        count = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side]
        return count + sums[:-side, :-side] == side * side

    fits, least, above = squares(1), 1, min(mask.shape) + 1
    while above - least > 1:
        side = (least + above) // 2
        found = squares(side)
        if found.any():
            fits, least = found, side
        else:
            above = side
    y, x = divmod(int(fits.argmax()), fits.shape[1])
    return x + (least - 1) / 2, y + (least - 1) / 2


def resized_point(point: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """The point of an image of size ``before``, (height, width), resized to ``after``."""
    return point * np.array([after[1] / before[1], after[0] / before[0], 1.0])


def parsed_point(text: str) -> np.ndarray:
    """Parse a foreground point ``x,y``; raise ValueError for other text."""
    try:
        point = np.array([float(number) for number in text.split(",")])
    except ValueError:
        point = np.empty(0)
    if point.shape != (2,) or not np.isfinite(point).all():
        raise ValueError(f"point is {text!r}; expected two numbers x,y such as 60,45")
    return np.array([*point, 1.0])


def check_point(point: np.ndarray, size: Sequence[int], name: str) -> None:
    """ValueError when a point is beyond the image ``name`` of ``size`` (height, width)."""
    height, width = size
    x, y, _ = point
    if not (0 <= x <= width and 0 <= y <= height):
        raise ValueError(f"point {x:g},{y:g} is not inside image {name}, which is {width}x{height}")
