# SPDX-License-Identifier: Apache-2.0
"""Images with the truth of several tasks as batches: derived maps, resizing, flips, padding.

A truth is int32 (H, W) of binary (0, 1) and semantic tasks, -1 where nothing counts, and float32
(C, H, W) of regression, NaN where there is no value.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from samfast.training.augment import Change, change_of
from samfast.training.coco_items import MaskSource
from samfast.training.data import flipped_axes, resize_image, resize_mask
from samfast.training.foreground import binary_mask
from samfast.training.image_options import ImageOptions
from samfast.training.images import read_image
from samfast.training.object_maps import object_maps
from samfast.training.object_numbers import numbered
from samfast.training.task_files import is_ignored, read_stored
from samfast.training.task_items import Item
from samfast.training.tasks import UNLABELLED, TaskSpec

_AS_TAGGED = ImageOptions()


def boundary(labels: np.ndarray) -> np.ndarray:
    """int32 (H, W): 1 where a pixel above, below, left or right has another class, else 0.

    labels: int32 (H, W); -1 is no class and makes no boundary, and stays -1
    """
    edge = np.zeros(labels.shape, bool)
    known = labels >= 0
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = (labels[a] != labels[b]) & known[a] & known[b]
        edge[a] |= differ
        edge[b] |= differ
    return np.where(known, edge, -1).astype(np.int32)


def distance(labels: np.ndarray) -> np.ndarray:
    """float32 (H, W): pixels to the nearest of the boundary, 0 on it; NaN where labels are -1, and
    everywhere in an image without a boundary."""
    from scipy.ndimage import distance_transform_edt  # comes with scikit-image

    edge = boundary(labels)
    if not (edge == 1).any():
        return np.full(labels.shape, np.nan, np.float32)
    return np.where(edge < 0, np.nan, distance_transform_edt(edge != 1)).astype(np.float32)


def labels_of(spec: TaskSpec, stored: np.ndarray) -> np.ndarray:
    """int32 (H, W): the classes that a file stores, -1 where none counts."""
    ignored = is_ignored(spec, stored) | (stored == UNLABELLED)
    return np.where(ignored, np.int32(-1), stored.astype(np.int32))


def truth_of(spec: TaskSpec, stored: np.ndarray) -> np.ndarray:
    """The truth of a task from what its file stores."""
    if spec.of_objects:
        return of_objects(spec, object_maps(stored))
    if spec.labels:
        return truth_of_labels(spec, labels_of(spec, stored))
    ignored = is_ignored(spec, stored)
    if spec.kind == "binary":
        foreground = binary_mask(stored, spec.rule).astype(np.int32)
        return np.where(ignored, np.int32(-1), foreground)
    values = np.where(ignored, np.nan, stored).astype(np.float32)
    return np.moveaxis(spec.scale * values + np.float32(spec.offset), -1, 0)


def of_objects(spec: TaskSpec, maps: dict[str, np.ndarray]) -> np.ndarray:
    """The truth of a task of objects from all of their maps."""
    values = maps[spec.object_map]
    if spec.kind == "binary":
        return values
    return spec.scale * values[None] + np.float32(spec.offset)


def truth_of_labels(spec: TaskSpec, labels: np.ndarray) -> np.ndarray:
    """The truth of a semantic or derived task from its classes, int32 (H, W)."""
    if spec.derive is None:
        return labels
    if spec.derive == "boundary":
        return boundary(labels)
    return spec.scale * distance(labels)[None] + np.float32(spec.offset)


def flipped(spec: TaskSpec, truth: np.ndarray, axes: Iterable[int]) -> np.ndarray:
    """The truth of the mirrored image; axis 0 is the height, 1 the width.

    Directions are mirrored too: x, channel 0, along the width and y, channel 1, along the height.
    """
    for axis in axes:
        truth = np.flip(truth, axis - 2)
        if spec.loss == "cosine":
            truth = truth.copy()
            truth[1 - axis] *= -1
    return np.ascontiguousarray(truth)


def resized(truth: np.ndarray, image_size: int) -> np.ndarray:
    """A truth at the model's size, nearest neighbour."""
    if truth.ndim == 2:
        return resize_mask(truth, image_size)
    return np.stack([resize_mask(channel, image_size) for channel in truth])


class TaskSample(NamedTuple):
    """One image at the model's size; truths at that size and at the file's own, by task."""

    image: np.ndarray  # uint8 (h, w, 3)
    targets: dict[str, np.ndarray]
    truths: dict[str, np.ndarray]


class TaskBatch(NamedTuple):
    """A batch of images, each with the truth of the tasks that have it. S: the image size."""

    images: Tensor  # uint8 (B, 3, S, S), 0 in the padding
    sizes: Tensor  # int64 (B, 2), the valid height and width
    rows: dict[str, list[int]]  # by task, the images that have its truth
    targets: dict[str, Tensor]  # int64 (rows, S, S) or float32 (rows, C, S, S); -1, NaN: padding
    truths: dict[str, list[Tensor]]  # at the files' own sizes; empty in training


class _Maps(NamedTuple):
    """The maps of a file's objects at the model's size and, unless left out, at its own."""

    target: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]


class HasTargets(Protocol):
    """An image with what each of its tasks is read from, by the task's name."""

    @property
    def targets(self) -> Mapping[str, MaskSource]: ...


T = TypeVar("T", bound=HasTargets)


class TargetDataset(Dataset[TaskSample], Generic[T]):
    """Images with their targets as samples; a key is an index or (index, pass).

    Flips are as in PairDataset.

    So is ``augment``. Derived maps are made of the changed labels; what comes in from outside
    counts nowhere. Measured values do not follow "strong", see ``check_follows``.

    Every file is read once, whatever the number of tasks it serves. truths: whether samples have
    objects' maps at the files' own size, which take long and which training does not need.

    How ``read_image`` and ``read_stored`` read is a subclass's matter.
    """

    def __init__(
        self,
        items: Sequence[T],
        specs: Sequence[TaskSpec],
        image_size: int,
        *,
        flips: bool = False,
        augment: str = "none",
        seed: int = 0,
        options: ImageOptions = _AS_TAGGED,
        truths: bool = True,
    ):
        self.truths = truths
        self.options = options
        self.items = tuple(items)
        self.specs = tuple(specs)
        self.image_size = image_size
        self.flips = flips
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> TaskSample:
        index, number = key if isinstance(key, tuple) else (key, 0)
        item = self.items[index]
        axes = flipped_axes(self.seed, number, index) if self.flips else []
        image = self.read_image(item)
        for axis in axes:
            image = np.flip(image, axis)
        change = change_of(self.augment, self.seed, number, index)
        if change is not None:
            image = change.moved(np.ascontiguousarray(image))
        truths: dict[str, np.ndarray] = {}
        targets: dict[str, np.ndarray] = {}
        files: dict[tuple[MaskSource, bool], np.ndarray] = {}
        maps: dict[tuple[MaskSource, bool], _Maps] = {}  # once for all tasks
        for spec in self.specs:
            if spec.name in item.targets:
                file = item.targets[spec.name], spec.labels or spec.kind == "binary"
                if file not in files:
                    files[file] = self.read_stored(item, spec)
                if spec.of_objects:  # made anew of objects as large as the model sees them
                    if file not in maps:
                        maps[file] = self._maps(files[file], axes, change)
                    targets[spec.name] = of_objects(spec, maps[file].target)
                    if self.truths:
                        truths[spec.name] = of_objects(spec, maps[file].truth)
                    continue
                truths[spec.name], targets[spec.name] = self._truth(spec, files[file], axes, change)
        image = resize_image(np.ascontiguousarray(image), self.image_size)
        if change is not None:
            image = change.coloured(image)
        return TaskSample(image, targets, truths)

    def read_image(self, item: T) -> np.ndarray:
        """uint8 (H, W, 3) of an item, before flips."""
        raise NotImplementedError

    def read_stored(self, item: T, spec: TaskSpec) -> np.ndarray:
        """What the file of a task stores, see ``task_files.read_stored``."""
        raise NotImplementedError

    def _maps(self, stored: np.ndarray, axes: Iterable[int], change: Change | None) -> _Maps:
        """The maps of the objects that a file stores."""
        labels = np.ascontiguousarray(np.flip(numbered(stored)[0], tuple(axes)))
        if change is not None:
            labels = change.moved(labels, fill=-1)
        target = object_maps(resize_mask(labels, self.image_size))
        return _Maps(target, object_maps(labels) if self.truths else {})

    def _truth(
        self, spec: TaskSpec, stored: np.ndarray, axes: Iterable[int], change: Change | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The truth of the changed image, at its own size and at the model's."""
        if not spec.labels:
            truth = flipped(spec, truth_of(spec, stored), axes)
            if change is not None and change.moves:
                truth = change.moved(truth, fill=-1)
            return truth, resized(truth, self.image_size)
        labels = flipped(spec, labels_of(spec, stored), axes)
        if change is not None:
            labels = change.moved(labels, fill=-1)
        truth = truth_of_labels(spec, labels)
        if spec.derive == "boundary":  # a line of a few pixels, which resizing would break
            return truth, boundary(resized(labels, self.image_size))
        return truth, resized(truth, self.image_size)


class TaskDataset(TargetDataset[Item]):
    """``TargetDataset`` of files."""

    def read_image(self, item: Item) -> np.ndarray:
        return read_image(item.image, self.options)

    def read_stored(self, item: Item, spec: TaskSpec) -> np.ndarray:
        return read_stored(spec, item.targets[spec.name])


def check_follows(specs: Iterable[TaskSpec], augment: str) -> None:
    """Raise ValueError for a task whose stored values need not fit a turned or scaled image."""
    for spec in specs:
        if augment == "strong" and spec.kind == "regression" and not spec.labels:
            raise ValueError(
                f"augment is strong, but task {spec.name} has measured values, which turning and "
                "scaling may invalidate; use --augment light"
            )


class TaskCollate:
    """Pad samples to the square and stack them; ``truths`` keeps those at the files' sizes."""

    def __init__(self, specs: Sequence[TaskSpec], image_size: int, *, truths: bool):
        self.specs = tuple(specs)
        self.image_size = image_size
        self.truths = truths

    def __call__(self, samples: Sequence[TaskSample]) -> TaskBatch:
        side = self.image_size
        images = np.zeros((len(samples), 3, side, side), np.uint8)
        sizes = np.zeros((len(samples), 2), np.int64)
        for i, sample in enumerate(samples):
            height, width = sizes[i] = sample.image.shape[:2]
            images[i, :, :height, :width] = sample.image.transpose(2, 0, 1)
        rows, targets, truths = {}, {}, {}
        for spec in self.specs:
            name = spec.name
            rows[name] = [i for i, sample in enumerate(samples) if name in sample.targets]
            values = spec.kind == "regression"
            shape = (len(rows[name]), *((spec.channels,) if values else ()), side, side)
            target = np.full(shape, np.nan if values else -1, np.float32 if values else np.int64)
            for to, i in zip(target, rows[name], strict=True):
                height, width = sizes[i]
                to[..., :height, :width] = samples[i].targets[name]
            targets[name] = torch.from_numpy(target)
            kept = rows[name] if self.truths else []
            truths[name] = [torch.from_numpy(samples[i].truths[name]) for i in kept]
        return TaskBatch(torch.from_numpy(images), torch.from_numpy(sizes), rows, targets, truths)
