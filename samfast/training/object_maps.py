# SPDX-License-Identifier: Apache-2.0
"""What a model learns of objects without prompts: where they are, their centres and their depth.

The three maps of label images, (H, W) integers with 0 for no object:

    foreground   1 in objects, else 0
    depth        distance to the nearest pixel beside the own object, over the object's largest
    centre       1 at the deepest pixel of each object, falling with the distance from it to 0

Depth and centre are in [0, 1] in objects of every size, and count nowhere else: NaN. So what is
learned of them does not depend on how much of an image objects cover. Where labels are negative,
nothing counts: -1, NaN. Together they give the
objects back by a watershed: ``samfast.training.watershed``. Archit et al., Segment Anything for
Microscopy (2025), learn distances of the same kind.
"""

import numpy as np

from samfast.training.object_numbers import numbered


def object_maps(labels: np.ndarray) -> dict[str, np.ndarray]:
    """{"foreground": int32, "centre": float32, "depth": float32}, each (H, W)."""
    from scipy import ndimage

    hidden = labels < 0
    labels, count = numbered(np.where(hidden, 0, labels))
    inside = labels > 0
    maps = {"foreground": np.where(hidden, np.int32(-1), inside.astype(np.int32))}
    depth = np.zeros(labels.shape, np.float32)
    centre = np.zeros(labels.shape, np.float32)
    if count:
        ids = np.arange(1, count + 1)
        depth = _depth(inside & ~_edges(labels))
        deepest = np.concatenate([[1.0], ndimage.maximum(depth, labels, ids)])
        middle = np.array([(0, 0), *ndimage.maximum_position(depth, labels, ids)], np.float64)
        depth = np.where(inside, depth / deepest[labels], 0).astype(np.float32)
        y, x = np.indices(labels.shape, np.float32)
        away = np.hypot(y - middle[labels, 0], x - middle[labels, 1])
        most = np.concatenate([[1.0], ndimage.maximum(away, labels, ids)])
        centre = np.where(inside, 1 - away / np.maximum(most, 1)[labels], 0).astype(np.float32)
    for name, values in (("centre", centre), ("depth", depth)):
        maps[name] = np.where(inside, values, np.float32(np.nan))
    return maps


def _depth(inner: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest that is not True, and 1 more; to the image's border
    where all are."""
    from scipy import ndimage

    if inner.all():
        return ndimage.distance_transform_edt(np.pad(inner, 1))[1:-1, 1:-1]
    return ndimage.distance_transform_edt(inner) + 1.0


def _edges(labels: np.ndarray) -> np.ndarray:
    """bool (H, W): pixels beside one of another value."""
    edge = np.zeros(labels.shape, bool)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = labels[a] != labels[b]
        edge[a] |= differ
        edge[b] |= differ
    return edge
