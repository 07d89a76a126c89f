# SPDX-License-Identifier: Apache-2.0
"""Label images: (H, W) whole numbers, the number of an object in each of its pixels, 0 for none."""

import numpy as np

from samfast.training.stacks import Source


def numbered(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Objects' numbers (H, W), any whole numbers from 0 on, as 0 to N in their order; and N.

    int32; 0, no object, stays 0, and -1, which counts nowhere, stays -1.
    """
    hidden = labels < 0
    if hidden.any():
        made, count = numbered(np.where(hidden, 0, labels))
        return np.where(hidden, np.int32(-1), made), count
    ids, inverse = np.unique(labels, return_inverse=True)
    first = int(len(ids) == 0 or ids[0] != 0)  # no pixel without an object
    return (inverse.reshape(labels.shape) + first).astype(np.int32), len(ids) - 1 + first


def kept_objects(labels: np.ndarray, min_size: int = 0) -> np.ndarray:
    """Numbered from 1 on without a gap, int32 (H, W), without objects of fewer pixels."""
    ids, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    keep = (ids > 0) & (sizes >= min_size)
    new = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return new[inverse.reshape(labels.shape)]


def check_numbers(path: Source, values: np.ndarray) -> None:
    """ValueError where a mask holds what cannot be the number of an object."""
    if (values < 0).any():
        raise ValueError(
            f"mask {path} holds the value {values.min()}, but --masks instances expects object "
            "numbers from 0 on (0 for background)"
        )
