# SPDX-License-Identifier: Apache-2.0
"""The objects of one image, each a mask, kept without an array of objects by height by width."""

import numpy as np
from scipy import ndimage


class Objects:
    """The objects of an image of ``size``, (height, width), in the order of their numbers.

    boxes: float64 (N, 4), x0, y0, x1, y1, the centres of the first and the last pixel
    areas: int64 (N,), in pixels
    """

    def __init__(self, labels: np.ndarray):
        """labels: int (H, W), object i is i + 1, every number is there"""
        self.size = labels.shape
        self._labels = labels
        self._places = ndimage.find_objects(labels)
        self.areas = np.bincount(labels.ravel(), minlength=len(self._places) + 1)[1:]
        corners = [(x.start, y.start, x.stop - 1, y.stop - 1) for y, x in self._places]
        self.boxes = np.array(corners, np.float64).reshape(-1, 4)

    @classmethod
    def from_labels(cls, labels: np.ndarray) -> "Objects":
        """Objects of an integer array (H, W): 0 is background, other numbers are of objects.

        Raises ValueError for a number below 0.
        """
        if (least := int(labels.min(initial=0))) < 0:
            raise ValueError(f"the least number is {least}; objects have numbers from 1")
        numbers, places = np.unique(labels, return_inverse=True)
        ranks = np.cumsum(numbers > 0)  # 0 stays 0
        return cls(ranks[places].reshape(labels.shape).astype(np.int32))

    def __len__(self) -> int:
        return len(self._places)

    def mask(self, i: int) -> np.ndarray:
        """bool (H, W) of object i."""
        mask = np.zeros(self.size, bool)
        place = self._places[i]
        mask[place] = self._labels[place] == i + 1
        return mask

    def labels(self) -> np.ndarray:
        """int32 (H, W), 0 for the background, i + 1 for object i."""
        return self._labels.copy()
