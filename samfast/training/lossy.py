# SPDX-License-Identifier: Apache-2.0
"""The values that a mask had before lossy compression (JPEG, lossy WebP) changed them.

Where nothing changes nearby, such codecs keep a value to within a few steps; next to an edge they
do not. So the values are read off the pixels whose 3 x 3 neighbourhood is flat. All others take the
nearest of these values: of two, the threshold lies midway between them.
"""

from dataclasses import dataclass

import numpy as np

_FLAT = 2  # largest range of a flat neighbourhood
_GAP = 6  # steps without a flat pixel that separate two values
_FEWEST = 4  # flat pixels that a value needs; ringing makes single ones
_WIDEST = 12  # steps that a single value spreads over; more are many values
_NOISE = 8  # steps from the only flat value that are not an object
_END = 3  # steps from 0 or 255 that are meant as these
_PEAK_END = 60  # the same for values known from a peak without a flat pixel
_OVERSHOOT = 0.5  # of the contrast: beyond that lies another value
_PART = (0.42, 0.62)  # of the contrast: an object that peaks between these has another value
_ONES = 0.9  # share of 1 among values above 0 in a mask of 0 and 1


@dataclass(frozen=True)
class Levels:
    """The values of a lossy mask, in order.

    exact: False where an object is so small that its value is known roughly only
    """

    values: tuple[int, ...]
    exact: bool = True

    def nearest(self, grey: np.ndarray) -> np.ndarray:
        """uint8 (H, W): every pixel as the nearest value."""
        values = np.asarray(self.values, np.float64)
        middles = (values[1:] + values[:-1]) / 2
        return values.astype(np.uint8)[np.searchsorted(middles, grey)]


def find_levels(grey: np.ndarray) -> Levels | None:
    """The values of a mask from its decoded grey values, uint8 (H, W).

    None where they cannot be told apart: a photograph, or more values than lie apart.
    """
    low, high = int(grey.min()), int(grey.max())
    if high - low <= _NOISE:
        return _of_small_range(grey, low, high)
    counts = np.bincount(grey[_is_flat(grey)], minlength=256)
    groups = _groups(counts)
    if not groups or any(group[-1] - group[0] > _WIDEST for group in groups):
        return None
    found = [int(group[counts[group].argmax()]) for group in groups]
    levels = Levels(tuple(_end(value, _END) for value in found))
    if len(found) == 1:
        levels = _with_peak(found[0], low, high)
    over = _OVERSHOOT * (found[-1] - found[0])
    if len(found) > 1 and (high > found[-1] + over or low < found[0] - over):
        return None
    if len(levels.values) == 2 and _other_value(grey, *levels.values):
        return None
    return levels


def named(levels: Levels, wanted: tuple[float, ...]) -> Levels:
    """The levels as the values that were asked for, where these are only a few steps away."""
    near = [min(wanted, key=lambda w: abs(w - value), default=value) for value in levels.values]
    pairs = zip(levels.values, near, strict=True)
    return Levels(tuple(int(n) if abs(n - v) <= _END else v for v, n in pairs), levels.exact)


def _of_small_range(grey: np.ndarray, low: int, high: int) -> Levels | None:
    """Masks of 0 and 1, and those of one value."""
    if low == 0 and high > 0:
        counts = np.bincount(grey.ravel(), minlength=2)
        return Levels((0, 1)) if counts[1] >= _ONES * counts[1:].sum() else None
    mode = low + int(np.bincount(grey.ravel() - np.uint8(low)).argmax())
    return Levels((255 if mode >= 255 - _END else mode,))


def _is_flat(grey: np.ndarray) -> np.ndarray:
    """bool (H, W): whether a pixel and its eight neighbours differ by at most ``_FLAT``."""
    low = high = np.pad(grey.astype(np.int16), 1, mode="edge")
    for axis in (0, 1):
        n = low.shape[axis]
        parts = [np.arange(i, n - 2 + i) for i in range(3)]
        low = np.minimum.reduce([low.take(part, axis) for part in parts])
        high = np.maximum.reduce([high.take(part, axis) for part in parts])
    return high - low <= _FLAT


def _groups(counts: np.ndarray) -> list[np.ndarray]:
    """Values with flat pixels, those within ``_GAP`` of each other together."""
    present = np.flatnonzero(counts)
    groups = np.split(present, np.flatnonzero(np.diff(present) > _GAP) + 1)
    return [group for group in groups if counts[group].sum() >= _FEWEST]


def _with_peak(flat: int, low: int, high: int) -> Levels:
    """One flat value, and the objects or holes that are too small to be flat."""
    peak = high if high - flat >= flat - low else low
    if abs(peak - flat) <= _NOISE:
        return Levels((_end(flat, _END),))
    if peak > flat:
        return Levels((_end(flat, _END), 255 if peak >= 255 - _PEAK_END else peak), exact=False)
    return Levels((0 if peak <= _PEAK_END else peak, _end(flat, _END)), exact=False)


def _other_value(grey: np.ndarray, low: int, high: int) -> bool:
    """Whether an object peaks half-way between two values: then a third value was there.

    Ringing stays below, and objects of the higher value reach above.
    """
    from scipy import ndimage  # comes with scikit-image

    share = (grey.astype(np.float32) - low) / (high - low)
    for part in (share, 1 - share):
        objects, count = ndimage.label(part > _PART[0], np.ones((3, 3), bool))
        if count and ndimage.maximum(part, objects, range(1, count + 1)).min() < _PART[1]:
            return True
    return False


def _end(value: int, reach: int) -> int:
    if value <= reach:
        return 0
    return 255 if value >= 255 - reach else value
