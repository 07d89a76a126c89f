# SPDX-License-Identifier: Apache-2.0
"""Objects from the maps of ``object_maps``, by a seeded watershed."""

import numpy as np

from samfast.training.object_numbers import kept_objects

_EIGHT = np.ones((3, 3), bool)  # neighbours of a pixel
SEED = 0.5  # of depth and of centre, above which a pixel is of an object's middle


def objects_of_maps(
    foreground: np.ndarray, centre: np.ndarray, depth: np.ndarray, min_size: int = 0
) -> np.ndarray:
    """The number of an object in each of its pixels, from 1 on, int32 (H, W); 0 for none.

    foreground: bool (H, W)   centre, depth: float (H, W), as predicted   min_size: the fewest
    pixels of an object

    Each connected middle is a seed, which grows down the depth over the foreground. A connected
    part of the foreground without a seed is an object by itself.
    """
    from scipy import ndimage
    from skimage.segmentation import watershed

    middles, count = ndimage.label(foreground & (centre > SEED) & (depth > SEED), _EIGHT)
    parts, number = ndimage.label(foreground)
    seeded = np.zeros(number + 1, bool)
    seeded[parts[middles > 0]] = True
    objects = watershed(-depth, middles, mask=foreground & seeded[parts])
    alone = (parts > 0) & ~seeded[parts]
    objects = np.where(alone, parts + count, objects)
    return kept_objects(objects, min_size)
