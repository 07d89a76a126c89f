# SPDX-License-Identifier: Apache-2.0
"""Images with their objects as batches for SAM, each object with a prompt of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from samfast.models.prompted import FirstPrompts
from samfast.training.augment import change_of
from samfast.training.boxes import foreground_box, jittered_box, resized_box
from samfast.training.coco_items import CocoMask, MaskSource
from samfast.training.corrective_clicks import point_in
from samfast.training.data import flipped_axes, model_size, names_of, resize_image
from samfast.training.file_pairs import Marked
from samfast.training.image_options import ImageOptions
from samfast.training.images import read_image
from samfast.training.label_files import read_labels
from samfast.training.objects import Objects
from samfast.training.points import resized_point

_OBJECT_STREAM, _CLICK_STREAM = 3, 4  # beside those of flips, boxes and points
_AS_TAGGED = ImageOptions()


class ObjectSample(NamedTuple):
    """One image at the model's size, with n objects of it.

    image: uint8 (h, w, 3)   masks: bool (n, h, w)   given, is_box: as ``FirstPrompts``, float64
    draws: float64 (n, rounds - 1), which wrong pixel each click is on
    objects: all of them at the file's own size; None in training
    name: of an image that is the same in every pass, apart from its objects
    """

    image: np.ndarray
    masks: np.ndarray
    given: np.ndarray
    is_box: np.ndarray
    draws: np.ndarray
    objects: Objects | None = None
    name: str | None = None


class ObjectBatch(NamedTuple):
    """A batch as the loop takes it, of B images with M objects. S is the model's image size.

    In scoring there are no masks, prompts and draws: ``objects`` are all that the images have.
    """

    images: Tensor  # uint8 (B, 3, S, S), 0 in the padding
    sizes: Tensor  # int64 (B, 2), the valid height and width
    counts: tuple[int, ...]  # the objects of each image, which are in sequence
    masks: Tensor  # bool (M, S, S)
    first: FirstPrompts  # float32 (M, 4), bool (M,)
    draws: Tensor  # float64 (M, rounds - 1)
    names: tuple[str, ...] = ()  # of images that are the same in every pass; empty: not all are
    objects: tuple[Objects, ...] = ()


def read_objects(path: MaskSource) -> Objects:
    """The objects of a file of their numbers, or of annotations; ValueError with the file for one
    that has none."""
    if isinstance(path, CocoMask):
        return path.image.objects()
    labels = read_labels(path)
    try:
        return Objects.from_labels(labels)
    except ValueError as error:
        raise ValueError(f"mask {path} does not hold objects: {error}") from None


def kept_lines(before: int, after: int) -> np.ndarray:
    """int (after,): which of ``before`` lines of a mask ``resize_mask`` keeps, or of its columns.

    A mask resized is mask[np.ix_(lines, columns)].
    """
    lines = Image.fromarray(np.arange(before, dtype=np.int32)[:, None])
    return np.asarray(lines.resize((1, after), Image.Resampling.NEAREST))[:, 0]


class ResizedObjects:
    """The masks of objects at the model's size. lines, columns: those of the file that are left"""

    def __init__(self, objects: Objects, side: int):
        self.objects = objects
        self.size = model_size(*objects.size, side)
        self.lines, self.columns = map(kept_lines, objects.size, self.size)

    def mask(self, i: int) -> np.ndarray:
        """bool (h, w) of object i; without a True pixel where nothing of it is left."""
        found = np.zeros(self.size, bool)
        lines, columns, left = self._left(i)
        found[np.ix_(lines, columns)] = left
        return found

    def _left(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lines and columns at the model's size that an object's box has, and its pixels there."""
        rows, columns = self.objects.window(i)
        at = np.flatnonzero((self.lines >= rows.start) & (self.lines < rows.stop))
        across = np.flatnonzero((self.columns >= columns.start) & (self.columns < columns.stop))
        some = np.ix_(self.lines[at] - rows.start, self.columns[across] - columns.start)
        return at, across, self.objects.crop(i)[some]

    def there(self) -> np.ndarray:
        """bool (N,), of which objects a pixel is left."""
        return np.array([self._left(i)[2].any() for i in range(len(self.objects))], bool)


def exact_prompt(kind: str, mask: np.ndarray, after: Sequence[int]) -> np.ndarray:
    """float64 (4,), an object's box, or its deepest point, as ``FirstPrompts`` has them.

    mask: bool (H, W), at the file's own size   after: the model's size (h, w)
    """
    if kind == "box":
        return resized_box(foreground_box(mask), mask.shape, after)
    return np.append(resized_point(point_in(mask), mask.shape, after), 0.0)


class ObjectDataset(Dataset[ObjectSample]):
    """The pairs of a split for training; a key is an index or (index, pass).

    Each sample has at most ``objects`` of its image's objects, drawn anew in each pass, of those
    that the model's size leaves a pixel. ``prompt`` "box" gives each its box, whose sides move by
    up to ``box_jitter`` pixels; "point" any point of it; "mixed" one of both with equal chance.
    All this, flips and ``augment``, which may change colours only, are functions of (seed, pass,
    index).
    """

    def __init__(
        self,
        pairs: Sequence[Marked],
        side: int,
        *,
        prompt: str,
        objects: int,
        rounds: int = 1,
        box_jitter: float = 0.0,
        flips: bool = False,
        augment: str = "none",
        options: ImageOptions = _AS_TAGGED,
        seed: int = 0,
    ):
        self.pairs = tuple(pairs)
        self.side = side
        self.prompt = prompt
        self.objects = objects
        self.rounds = rounds
        self.box_jitter = box_jitter
        self.flips = flips
        self.augment = augment
        self.options = options
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> ObjectSample:
        index, number = key if isinstance(key, tuple) else (key, 0)
        pair = self.pairs[index]
        image = resize_image(read_image(pair.image, self.options), self.side)
        resized = ResizedObjects(read_objects(pair.mask), self.side)
        # Flipped after the resize, so that the objects that are left are the same in every pass.
        axes = tuple(flipped_axes(self.seed, number, index)) if self.flips else ()
        rng = np.random.default_rng((self.seed, number, index, _OBJECT_STREAM))
        chosen = rng.permutation(np.flatnonzero(resized.there()))[: self.objects]
        masks = np.zeros((len(chosen), *resized.size), bool)
        given = np.zeros((len(chosen), 4))
        is_box = np.zeros(len(chosen), bool)
        for row, i in enumerate(chosen.tolist()):
            masks[row] = np.flip(resized.mask(i), axes)
            is_box[row] = rng.random() < 0.5 if self.prompt == "mixed" else self.prompt == "box"
            mask = np.flip(resized.objects.mask(i), axes)
            given[row] = self._prompt(mask, resized.size, is_box[row], rng)
        clicks = np.random.default_rng((self.seed, number, index, _CLICK_STREAM))
        draws = clicks.random((len(chosen), self.rounds - 1))
        change = change_of(self.augment, self.seed, number, index)
        name = None if self.flips or change is not None else str(pair.image)
        image = np.ascontiguousarray(np.flip(image, axes))
        if change is not None:
            image = change.coloured(image)
        return ObjectSample(image, masks, given, is_box, draws, name=name)

    def _prompt(
        self, mask: np.ndarray, size: tuple[int, int], is_box: bool, rng: np.random.Generator
    ) -> np.ndarray:
        """mask: bool (H, W), at the file's own size   size: of the image at the model's"""
        if not is_box:
            return np.append(resized_point(point_in(mask, rng), mask.shape, size), 0.0)
        box = exact_prompt("box", mask, size)
        return jittered_box(box, self.box_jitter, size, rng) if self.box_jitter > 0 else box


class ScoredObjects(Dataset[ObjectSample]):
    """The pairs of a split for scoring: images at the model's size, objects at the files' own."""

    def __init__(self, pairs: Sequence[Marked], side: int, options: ImageOptions = _AS_TAGGED):
        self.pairs = tuple(pairs)
        self.side = side
        self.options = options

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ObjectSample:
        pair = self.pairs[index]
        image = resize_image(read_image(pair.image, self.options), self.side)
        return unprompted(image, read_objects(pair.mask), str(pair.image))


def unprompted(image: np.ndarray, objects: Objects | None, name: str | None) -> ObjectSample:
    """A sample of an image, uint8 (h, w, 3), whose objects are prompted later."""
    nothing = np.zeros((0, *image.shape[:2]), bool)
    none = np.zeros(0, bool)
    return ObjectSample(image, nothing, np.zeros((0, 4)), none, np.zeros((0, 0)), objects, name)


class ObjectCollate:
    """Pad samples to the square of ``side`` pixels and stack them."""

    def __init__(self, side: int):
        self.side = side

    def __call__(self, samples: Sequence[ObjectSample]) -> ObjectBatch:
        side, counts = self.side, tuple(len(sample.masks) for sample in samples)
        images = np.zeros((len(samples), 3, side, side), np.uint8)
        sizes = np.zeros((len(samples), 2), np.int64)
        masks = np.zeros((sum(counts), side, side), bool)
        begin = 0
        for i, (sample, count) in enumerate(zip(samples, counts, strict=True)):
            height, width = sizes[i] = sample.image.shape[:2]
            images[i, :, :height, :width] = sample.image.transpose(2, 0, 1)
            masks[begin : begin + count, :height, :width] = sample.masks
            begin += count
        given = np.concatenate([sample.given for sample in samples]).astype(np.float32)
        is_box, draws = (
            np.concatenate([getattr(sample, name) for sample in samples])
            for name in ("is_box", "draws")
        )
        return ObjectBatch(
            torch.from_numpy(images),
            torch.from_numpy(sizes),
            counts,
            torch.from_numpy(masks),
            FirstPrompts(torch.from_numpy(given), torch.from_numpy(is_box)),
            torch.from_numpy(draws),
            names_of(samples),
            tuple(sample.objects for sample in samples if sample.objects is not None),
        )
