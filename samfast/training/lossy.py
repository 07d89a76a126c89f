# SPDX-License-Identifier: Apache-2.0
"""The values that a mask had before lossy compression (JPEG, lossy WebP) changed them.

Where nothing changes nearby, such codecs keep a value to within a few steps; next to an edge they
do not. So the values are read off the pixels whose 3 x 3 neighbourhood is flat. All others take the
nearest of these values: of two, the threshold lies midway between them.

Of a JPEG whose quantisation steps are known, the two values found are checked: the mask that they
make is coded again, and must decode to what the file decodes to.
"""

from dataclasses import dataclass, replace

import numpy as np

from samfast.training.jpeg_blocks import Coding

_FLAT = 2  # largest range of a flat neighbourhood
_GAP = 6  # steps without a flat pixel that separate two values
_FEWEST = 4  # flat pixels that a value needs; ringing makes single ones
_ENOUGH = 16  # flat pixels that tell a value to within _END
_WIDEST = 12  # steps that a single value spreads over; more are many values
_NOISE = 8  # steps from the only flat value that are not an object
_END = 5  # steps from 0 or 255 that are meant as these
_PEAK_END = 60  # the same for values known from a peak without a flat pixel
_OVERSHOOT = 0.5  # of the contrast: beyond that lies another value
# Shares of the contrast: what reaches the peak is an object. Ringing stays under the part, and
# under the faint one where no object is within a block.
_PEAK, _PART, _FAINT = 0.62, 0.42, 0.2
_BLOCK = 8
_AREA = 6  # side of an area whose value tells, where the steps are not known
_AREA_OFF = 6  # steps by which such areas of two values leave these at most
_NEAR = 16  # steps between values that a codec of unknown steps does not keep apart
_MIDDLE = 0.25  # of the contrast: nearer to the middle, a pixel's value is in doubt
_DOUBTFUL = 0.01  # of the pixels of the rarer value: so many in doubt are said
_MOVED = 0.2  # of the contrast: more, coded again, means that a pixel took the other value
_ONES = 0.9  # share of 1 among values above 0 in a mask of 0 and 1


@dataclass(frozen=True)
class Levels:
    """The values of a lossy mask, in order.

    exact: False where an object is so small that its value is known roughly only
    blurred: whether two values are so near that the compression may have exchanged some pixels'
    """

    values: tuple[int, ...]
    exact: bool = True
    blurred: bool = False

    def nearest(self, grey: np.ndarray) -> np.ndarray:
        """uint8 (H, W): every pixel as the nearest value."""
        values = np.asarray(self.values, np.float64)
        middles = (values[1:] + values[:-1]) / 2
        return values.astype(np.uint8)[np.searchsorted(middles, grey)]


def find_levels(grey: np.ndarray, coding: Coding | None = None) -> Levels | None:
    """The values of a mask from its decoded grey values, uint8 (H, W).

    coding: how it was compressed, None where that is not known
    None where they cannot be told apart: a photograph, or more values than lie apart.
    """
    low, high = int(grey.min()), int(grey.max())
    ends = _Ends(grey, coding)
    find = _of_small_range if high - low <= _NOISE else _of_flat_pixels
    levels = find(grey, low, high, ends)
    if levels is None or len(levels.values) > 2 or low == high:
        return levels
    if coding is not None:
        return _checked(grey, levels, coding)
    if len(levels.values) == 2:
        return None if _other_area(grey, levels) else replace(levels, blurred=_near(grey, levels))
    return levels


class _Ends:
    """Which of the values found are meant as 0 or 255.

    known: of a JPEG, the values of its blocks of one value; these are exact
    """

    def __init__(self, grey: np.ndarray, coding: Coding | None):
        self.known: tuple[int, ...] = ()
        if coding is not None:
            blocks = coding.blocks(grey)
            flat = blocks[(blocks == blocks[:, :1]).all(1), 0]
            self.decoded = {coding.of_one_value(end): end for end in (0, 255)}
            self.known = tuple(np.unique(flat).tolist())

    def __call__(self, value: int, reach: int = _END) -> int:
        if value in self.known:
            return self.decoded.get(value, value)
        if value <= reach:
            return 0
        return 255 if value >= 255 - reach else value


def _of_flat_pixels(grey: np.ndarray, low: int, high: int, ends: _Ends) -> Levels | None:
    counts = np.bincount(grey[_is_flat(grey)], minlength=256)
    groups = _groups(counts)
    if not groups or any(group[-1] - group[0] > _WIDEST for group in groups):
        return None
    found = [int(group[counts[group].argmax()]) for group in groups]
    enough = [int(counts[group].sum()) >= _ENOUGH for group in groups]
    reaches = [_END if many else 2 * _END for many in enough]
    levels = Levels(tuple(map(ends, found, reaches)), exact=all(enough))
    if len(found) == 1:
        levels = _with_peak(found[0], low, high, ends)
    over = _OVERSHOOT * (found[-1] - found[0])
    if len(found) > 1 and (high > found[-1] + over or low < found[0] - over):
        return None
    if len(set(levels.values)) < len(levels.values):
        return None
    if len(levels.values) == 2 and _other_value(grey, *levels.values):
        return None
    return levels


def _checked(grey: np.ndarray, levels: Levels, coding: Coding) -> Levels | None:
    """The levels of a JPEG that is not constant, where they explain all of its flat blocks."""
    if len(levels.values) == 1:
        return None
    again = coding.again(levels.nearest(grey))
    blocks = coding.blocks(grey)
    flat = (blocks == blocks[:, :1]).all(1)
    if (blocks != coding.blocks(again))[flat].any():
        return None
    contrast = levels.values[1] - levels.values[0]
    moved = np.abs(again.astype(np.int16) - grey).max() >= max(1, _MOVED * contrast)
    weak = contrast < sum(coding.steps) / len(coding.steps)
    return replace(levels, blurred=bool(weak or (levels.exact and moved)))


def _other_area(grey: np.ndarray, levels: Levels) -> bool:
    """Whether an area is flat and far from both values."""
    from scipy import ndimage  # comes with scikit-image

    spread = ndimage.maximum_filter(grey, _AREA) - ndimage.minimum_filter(grey, _AREA)
    away = np.abs(grey[spread <= 1].astype(np.int16)[:, None] - levels.values).min(1)
    return bool((away > _AREA_OFF).any())


def _near(grey: np.ndarray, levels: Levels) -> bool:
    low, high = levels.values
    doubtful = np.abs(grey - (low + high) / 2) < _MIDDLE * (high - low)
    objects = np.count_nonzero(levels.nearest(grey) == high)
    fewer = min(objects, grey.size - objects)
    return high - low < _NEAR or bool(levels.exact and doubtful.sum() > _DOUBTFUL * fewer)


def named(levels: Levels, wanted: tuple[float, ...]) -> Levels:
    """The levels as the values that were asked for, where these are only a few steps away.

    A value names only the level that is nearest to it, and 0 stays 0.
    """

    def name(value: int) -> int:
        near = min(wanted, key=lambda want: abs(want - value), default=value)
        nearest = min(levels.values, key=lambda other: abs(other - near))
        return int(near) if value and nearest == value and abs(near - value) <= _END else value

    return replace(levels, values=tuple(map(name, levels.values)))


def _of_small_range(grey: np.ndarray, low: int, high: int, ends: _Ends) -> Levels | None:
    """Masks of 0 and 1 or of two other near values, and those of one value."""
    if len(ends.known) == 2:
        return Levels(tuple(map(ends, ends.known)))
    if low == 0 and high > 0:
        counts = np.bincount(grey.ravel(), minlength=2)
        return Levels((0, 1)) if counts[1] >= _ONES * counts[1:].sum() else None
    mode = low + int(np.bincount(grey.ravel() - np.uint8(low)).argmax())
    return Levels((255 if ends(mode) == 255 else mode,))


def _is_flat(grey: np.ndarray) -> np.ndarray:
    """bool (H, W): whether a pixel and its eight neighbours differ by at most ``_FLAT``."""
    low = high = np.pad(grey, 1, mode="edge")
    for axis in (0, 1):
        low, high = (np.moveaxis(each, axis, 0) for each in (low, high))
        low = np.minimum(np.minimum(low[:-2], low[1:-1]), low[2:])
        high = np.maximum(np.maximum(high[:-2], high[1:-1]), high[2:])
        low, high = (np.moveaxis(each, 0, axis) for each in (low, high))
    return high - low <= _FLAT


def _groups(counts: np.ndarray) -> list[np.ndarray]:
    """Values with flat pixels, those within ``_GAP`` of each other together."""
    present = np.flatnonzero(counts)
    groups = np.split(present, np.flatnonzero(np.diff(present) > _GAP) + 1)
    return [group for group in groups if counts[group].sum() >= _FEWEST]


def _with_peak(flat: int, low: int, high: int, ends: _Ends) -> Levels:
    """One flat value, and the objects or holes that are too small to be flat."""
    peak = high if high - flat >= flat - low else low
    if abs(peak - flat) <= _NOISE:
        return Levels((ends(flat),))
    if peak > flat:
        return Levels((ends(flat), 255 if peak >= 255 - _PEAK_END else peak), exact=False)
    return Levels((0 if peak <= _PEAK_END else peak, ends(flat)), exact=False)


def _other_value(grey: np.ndarray, low: int, high: int) -> bool:
    """Whether something peaks well between two values: then a third value was there.

    Objects of the higher value reach above, and ringing is weak and close to them.
    """
    from scipy import ndimage  # comes with scikit-image

    rise = grey.astype(np.int16) - low
    for part in (rise, high - low - rise):
        peak, ring, faint = (limit * (high - low) for limit in (_PEAK, _PART, _FAINT))
        near = ndimage.maximum_filter((part >= peak).view(np.uint8), 2 * _BLOCK + 1)
        if ((part > faint) & (near == 0)).any():
            return True
        objects, count = ndimage.label(part > ring, np.ones((3, 3), bool))
        peaks = np.zeros(count + 1, bool)
        peaks[objects[part >= peak]] = True
        if not peaks[1:].all():
            return True
    return False
