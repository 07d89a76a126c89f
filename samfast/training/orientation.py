# SPDX-License-Identifier: Apache-2.0
"""The eight orientations of EXIF and of TIFF's tag 274."""

import numpy as np

_UNDO = {6: 8, 8: 6}  # every other orientation undoes itself


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """The (H, W, ...) array as it is meant to be seen; a view, for 5 to 8 of (W, H, ...)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def as_stored(array: np.ndarray, orientation: int) -> np.ndarray:
    """The inverse of ``upright``."""
    return upright(array, _UNDO.get(orientation, orientation))
