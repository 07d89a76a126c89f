# SPDX-License-Identifier: Apache-2.0
"""The objects of one image: boxes and areas, and masks on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from samfast.training.rle import check_size, counts_of, runs_of


class Objects:
    """The objects of an image of ``size`` (height, width); made by ``from_labels``, ``from_rles``.

    boxes: float64 (N, 4), x0, y0, x1, y1: the centres of the first and the last pixel
    areas: int64 (N,), pixels   ids: (N,), which label, or which RLE of the list, each object was
    empty: number of given objects without pixels, which are left out
    """

    def __init__(
        self,
        size: tuple[int, int],
        boxes: np.ndarray,
        areas: np.ndarray,
        ids: np.ndarray,
        empty: int = 0,
    ):
        self.size = size
        self.boxes = boxes
        self.areas = areas
        self.ids = ids
        self.empty = empty

    @staticmethod
    def from_labels(labels: np.ndarray) -> Objects:
        """Make one object for each nonzero value of an integer array (H, W); ids ascend.

        Raises ValueError for another shape or type, and for negative values.
        """
        return _Labelled(_checked_labels(labels))

    @staticmethod
    def from_rles(size: Sequence[int], rles: Sequence[dict[str, Any]]) -> Objects:
        """Make one object for each RLE {"size": [H, W], "counts": list or text}, as in COCO.

        Raises ValueError if one is not an RLE of an image of this size.
        """
        size = check_size(tuple(size))
        runs = []
        for i, rle in enumerate(rles):
            try:
                runs.append(runs_of(counts_of(rle, size)))
            except ValueError as error:
                raise ValueError(f"object {i} {error}") from None
        return _Runs(size, runs)

    def __len__(self) -> int:
        return len(self.areas)

    def window(self, i: int) -> tuple[slice, slice]:
        """The rows and columns of an object's box."""
        x0, y0, x1, y1 = (int(side) for side in self.boxes[self._index(i)])
        return slice(y0, y1 + 1), slice(x0, x1 + 1)

    def crop(self, i: int) -> np.ndarray:
        """An object's pixels in its box: bool (rows, columns) of ``window(i)``."""
        raise NotImplementedError

    def mask(self, i: int) -> np.ndarray:
        """An object's pixels: bool (H, W)."""
        out = np.zeros(self.size, bool)
        out[self.window(i)] = self.crop(i)
        return out

    def runs(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Where an object's runs start and end (exclusive): int64, in pixels of the columns in a
        row. Runs may touch."""
        rows, columns = self.window(i)
        inside = np.pad(self.crop(i).T.astype(np.int8), ((0, 0), (1, 1)))
        steps = np.diff(inside, axis=1)
        (column, start), (_, end) = np.nonzero(steps == 1), np.nonzero(steps == -1)
        first = (column + columns.start) * self.size[0] + rows.start
        return first + start, first + end

    def labels(self) -> np.ndarray:
        """int32 (H, W): 0 is background, object i is i + 1.

        Where objects overlap, the smaller one is on top; of equal ones, the first.
        """
        raise NotImplementedError

    def _index(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"object {i} of {len(self)}")
        return i


class _Labelled(Objects):
    """Objects that do not overlap, in one array."""

    def __init__(self, labels: np.ndarray):
        ids, self._labels = _numbered(labels)
        areas = np.bincount(self._labels.ravel(), minlength=len(ids) + 1)[1:].astype(np.int64)
        corners = [
            (x.start, y.start, x.stop - 1, y.stop - 1)
            for y, x in ndimage.find_objects(self._labels, len(ids))
        ]
        boxes = np.array(corners, np.float64).reshape(-1, 4)
        super().__init__((labels.shape[0], labels.shape[1]), boxes, areas, ids)

    def crop(self, i: int) -> np.ndarray:
        return self._labels[self.window(i)] == i + 1

    def labels(self) -> np.ndarray:
        return self._labels.copy()


class _Runs(Objects):
    """Objects as runs of pixels in the columns, of all objects after each other."""

    def __init__(self, size: tuple[int, int], runs: list[tuple[np.ndarray, np.ndarray]]):
        ids = np.array([i for i, (starts, _) in enumerate(runs) if len(starts)], np.int64)
        kept = [runs[i] for i in ids]
        counts = np.array([len(starts) for starts, _ in kept], np.int64)
        self._firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        none = np.zeros(0, np.int64)
        self._starts = np.concatenate([none, *(starts for starts, _ in kept)])
        self._ends = np.concatenate([none, *(ends for _, ends in kept)])
        boxes, areas = self._measured(size[0])
        super().__init__(size, boxes, areas, ids, len(runs) - len(ids))

    def _measured(self, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes and areas of all objects."""
        at, lasts = self._firsts[:-1], self._ends - 1
        if not len(at):
            return np.zeros((0, 4)), np.zeros(0, np.int64)
        left, right = self._starts // height, lasts // height
        over = right > left  # from one column on into the next
        top = np.where(over, 0, self._starts % height)
        bottom = np.where(over, height - 1, lasts % height)
        sides = [np.minimum.reduceat(side, at) for side in (left, top)]
        sides += [np.maximum.reduceat(side, at) for side in (right, bottom)]
        areas = np.add.reduceat(self._ends - self._starts, at)
        return np.stack(sides, 1).astype(np.float64), areas

    def runs(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        i = self._index(i)
        own = slice(self._firsts[i], self._firsts[i + 1])
        return self._starts[own], self._ends[own]

    def crop(self, i: int) -> np.ndarray:
        height, (rows, columns) = self.size[0], self.window(i)
        starts, ends = (side - columns.start * height for side in self.runs(i))
        width = columns.stop - columns.start
        steps = np.zeros(width * height + 1, np.int8)
        steps[starts] += 1
        steps[ends] -= 1
        inside = np.cumsum(steps[:-1], dtype=np.int8).reshape(width, height)
        return np.ascontiguousarray(inside.T[rows].astype(bool))

    def labels(self) -> np.ndarray:
        out = np.zeros(self.size[0] * self.size[1], np.int32)
        # The largest first; of equal ones the last.
        for i in np.lexsort((-np.arange(len(self)), -self.areas)):
            for start, end in zip(*(side.tolist() for side in self.runs(i)), strict=True):
                out[start:end] = i + 1
        return np.ascontiguousarray(out.reshape(self.size[1], self.size[0]).T)


def _checked_labels(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(
            f"labels are {labels.dtype} of shape {labels.shape}; expected integers of shape (H, "
            "W), 0 for the background"
        )
    if labels.min() < 0:
        raise ValueError(
            f"labels hold {labels.min()}; expected 0 for the background and a positive value for "
            "each object"
        )
    return labels


def _numbered(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values but 0, ascending, and int32 (H, W) that counts them from 1."""
    top = int(labels.max())
    if top <= 2**16 + 4 * labels.size:  # a table of all values is small
        held = np.bincount(labels.ravel().astype(np.int64), minlength=1) > 0
        held[0] = False
        table = np.cumsum(held, dtype=np.int32) * held
        return np.flatnonzero(held), table[labels]
    values, places = np.unique(labels, return_inverse=True)
    places = places.reshape(labels.shape).astype(np.int32)
    return (values[1:], places) if values[0] == 0 else (values, places + 1)
