# SPDX-License-Identifier: Apache-2.0
"""Pairs of files as batches for SAM: resizing, flips, boxes, padding.

SAM's geometry: the longest side becomes the model's image size (bilinear for images, nearest for
masks), the rest of the square (right and bottom) is padding, which loss and metrics ignore.
"""

from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from samfast.training.augment import change_of
from samfast.training.boxes import foreground_box, jittered_box, resized_box
from samfast.training.folders import Pair
from samfast.training.foreground import Foreground, chosen_foreground, chosen_ignore, counted_mask
from samfast.training.image_options import ImageOptions
from samfast.training.images import read_image, read_mask
from samfast.training.points import clicked_point, resized_point


def model_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """(height, width) after scaling the longest side to ``image_size``; at least one pixel."""
    scale = image_size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (h, w, 3), longest side ``image_size``, PIL's bilinear filter."""
    height, width = model_size(image.shape[0], image.shape[1], image_size)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def resize_mask(mask: np.ndarray, image_size: int) -> np.ndarray:
    """(H, W) -> (h, w), bool, int32 or float32, longest side ``image_size``, nearest neighbour."""
    height, width = model_size(mask.shape[0], mask.shape[1], image_size)
    # Pillow's own bool has the byte 255 for True, which not all code takes for 1.
    stored = mask.view(np.uint8) if mask.dtype == bool else mask
    resized = Image.fromarray(stored).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized).view(mask.dtype)


def flipped_axes(seed: int, number: int, index: int) -> list[int]:
    """Return which of the axes 0 and 1 of image ``index`` to flip in pass ``number``."""
    rng = np.random.default_rng((seed, number, index))
    return np.flatnonzero(rng.random(2) < 0.5).tolist()


_AS_TAGGED = ImageOptions()
_POINT_STREAM = 2
_BOX_STREAM = 1  # keeps the numbers that move boxes apart from those that choose flips


class Sample(NamedTuple):
    """One pair at the model's size, and the truth at the file's own size."""

    image: np.ndarray  # uint8 (h, w, 3)
    mask: np.ndarray  # bool (h, w)
    truth: np.ndarray  # bool (H, W)
    box: np.ndarray | None = None  # float64 (4,), or a point (3,), in pixels of ``image``
    name: str | None = None  # of an image that is the same in every pass
    ignored: np.ndarray | None = None  # bool (h, w), what counts nowhere; None: nothing
    truth_ignored: np.ndarray | None = None  # the same, bool (H, W)


class Batch(NamedTuple):
    """A batch as the loop takes it. S is the model's image size."""

    images: Tensor  # uint8 (B, 3, S, S), 0 in the padding
    masks: Tensor  # bool (B, S, S)
    sizes: Tensor  # int64 (B, 2), the valid height and width
    truths: list[Tensor]  # B times bool (H, W), the files' own sizes; empty in training
    boxes: Tensor | None = None  # float32 (B, 4), or points (B, 3), in pixels of ``images``
    names: tuple[str, ...] = ()  # of images that are the same in every pass; empty: not all are
    ignored: Tensor | None = None  # bool (B, S, S), what counts nowhere; None: nothing
    truths_ignored: Sequence[Tensor] = ()  # of each truth the same; empty: nothing


class EpochSampler(Sampler[tuple[int, int]]):
    """``repeats`` passes over all indices for each epoch, each in an order of its own.

    Yields (index, pass) keys; pass numbers never return in later epochs. Order is a function of
    (seed, pass), which travels with the index so that flips need no state in any worker.
    """

    def __init__(self, length: int, seed: int, repeats: int = 1):
        self.length = length
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to draw next (accelerate's loaders call it by this name too)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length * self.repeats

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in range(self.epoch * self.repeats, (self.epoch + 1) * self.repeats):
            order = np.random.default_rng((self.seed, number)).permutation(self.length)
            yield from ((index, number) for index in order.tolist())


V = TypeVar("V")


class MaskDataset(Dataset[Sample], Generic[V]):
    """The views of a split as samples; a key is an index or (index, pass).

    What ``read`` makes of a view is a subclass's matter.

    With ``flips``, each sample is mirrored left-right and top-bottom with probability 1/2 each, a
    function of (seed, pass, index): the same in every run and for any number of workers.

    ``augment`` changes them further, see ``change_of``; boxes and points are those of the changed
    mask, of which pixels from outside count nowhere.

    Pixels with values in ``ignore`` are not foreground and are ignored.

    With ``prompt`` "box", samples carry the box of their foreground (of the whole image where there
    is none), taken at the file's own size. In training its sides move by up to ``box_jitter``
    pixels of the resized image, another function of (seed, pass, index).

    With ``prompt`` "point", samples carry a point of their foreground: with ``random_points`` any
    one, a third function of these; otherwise the deepest inside.
    """

    def __init__(
        self,
        pairs: Sequence[V],
        image_size: int,
        *,
        foreground: Foreground = None,
        ignore: Sequence[float] = (),
        options: ImageOptions = _AS_TAGGED,
        flips: bool = False,
        augment: str = "none",
        prompt: str = "none",
        box_jitter: float = 0.0,
        random_points: bool = False,
        seed: int = 0,
    ):
        self.pairs = tuple(pairs)
        self.image_size = image_size
        self.foreground = chosen_foreground(foreground)
        self.ignore = chosen_ignore(ignore, self.foreground)
        self.options = options
        self.flips = flips
        self.augment = augment
        self.prompt = prompt
        self.box_jitter = box_jitter
        self.random_points = random_points
        self.seed = seed

    @property
    def changes(self) -> bool:
        """True if an image may differ from one pass to the next."""
        return self.flips or self.augment != "none"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, number = key if isinstance(key, tuple) else (key, 0)
        pair = self.pairs[index]
        image, values, name = self.read(pair, number)
        truth, ignored = counted_mask(values, self.foreground, self.ignore)
        axes = flipped_axes(self.seed, number, index) if self.flips else []
        image, truth = _mirrored(image, axes), _mirrored(truth, axes)
        ignored = None if ignored is None else _mirrored(ignored, axes)
        change = change_of(self.augment, self.seed, number, index)
        if change is not None and change.moves:
            ignored = np.zeros(truth.shape, bool) if ignored is None else ignored
            image, truth = change.moved(image), change.moved(truth)
            ignored = change.moved(ignored, fill=True)
        mask = resize_mask(truth, self.image_size)
        box = self._prompt(truth, mask.shape, number, index)
        image = resize_image(image, self.image_size)
        if change is not None:
            image = change.coloured(image)
        resized = None if ignored is None else resize_mask(ignored, self.image_size)
        return Sample(image, mask, truth, box, name, resized, ignored)

    def _prompt(
        self, truth: np.ndarray, size: Sequence[int], number: int, index: int
    ) -> np.ndarray | None:
        """The box or point of a truth in pixels of ``size``, (height, width); None for neither."""
        key = (self.seed, number, index)
        if self.prompt == "point":
            rng = np.random.default_rng((*key, _POINT_STREAM)) if self.random_points else None
            return resized_point(clicked_point(truth, rng), truth.shape, size)
        if self.prompt != "box":
            return None
        box = resized_box(foreground_box(truth), truth.shape, size)
        if self.box_jitter > 0:
            rng = np.random.default_rng((*key, _BOX_STREAM))
            box = jittered_box(box, self.box_jitter, size, rng)
        return box

    def read(self, pair: V, number: int) -> tuple[np.ndarray, np.ndarray, str | None]:
        """Image and mask values as they are before flips; a name where a sample never changes."""
        raise NotImplementedError


class PairDataset(MaskDataset[Pair]):
    """``MaskDataset`` of pairs of files."""

    def read(self, pair: Pair, number: int) -> tuple[np.ndarray, np.ndarray, str | None]:
        image = read_image(pair.image, self.options)
        values = read_mask(pair.mask, self.foreground, self.ignore)
        return image, values, None if self.changes else str(pair.image)


def _mirrored(values: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    return np.ascontiguousarray(np.flip(values, tuple(axes)))


class Collate:
    """Pad samples to the square and stack them; ``truths`` keeps the full-size masks."""

    def __init__(self, image_size: int, *, truths: bool):
        self.image_size = image_size
        self.truths = truths

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        side = self.image_size
        images = np.zeros((len(samples), 3, side, side), np.uint8)
        masks = np.zeros((len(samples), side, side), bool)
        sizes = np.zeros((len(samples), 2), np.int64)
        for i, sample in enumerate(samples):
            height, width = sizes[i] = sample.mask.shape
            images[i, :, :height, :width] = sample.image.transpose(2, 0, 1)
            masks[i, :height, :width] = sample.mask
        truths = [torch.from_numpy(sample.truth) for sample in samples] if self.truths else []
        boxes = None
        if samples and samples[0].box is not None:
            boxes = torch.from_numpy(np.array([sample.box for sample in samples], np.float32))
        return Batch(
            torch.from_numpy(images),
            torch.from_numpy(masks),
            torch.from_numpy(sizes),
            truths,
            boxes,
            names_of(samples),
            *self._ignored(samples),
        )

    def _ignored(self, samples: Sequence[Sample]) -> tuple[Tensor | None, Sequence[Tensor]]:
        """What counts nowhere, of the batch and of each truth; (None, ()) where all counts."""
        if all(sample.ignored is None for sample in samples):
            return None, ()
        side = self.image_size
        ignored = np.zeros((len(samples), side, side), bool)
        truths = []
        for to, sample in zip(ignored, samples, strict=True):
            if sample.ignored is not None:
                height, width = sample.mask.shape
                to[:height, :width] = sample.ignored
            if self.truths:
                none = np.zeros(sample.truth.shape, bool)
                own = none if sample.truth_ignored is None else sample.truth_ignored
                truths.append(torch.from_numpy(own))
        return torch.from_numpy(ignored), truths


class Named(Protocol):
    """A sample with the name of its image, if that is the same in every pass."""

    @property
    def name(self) -> str | None: ...


def names_of(samples: Sequence[Named]) -> tuple[str, ...]:
    """The names of all samples; () where one has none."""
    names = tuple(sample.name for sample in samples if sample.name is not None)
    return names if len(names) == len(samples) else ()


def counting(batch: Batch, valid: Tensor) -> Tensor:
    """valid bool (B, S, S) -> where the batch's masks count, on the device of ``valid``."""
    return valid if batch.ignored is None else valid & ~batch.ignored.to(valid.device)


def valid_region(sizes: Tensor, image_size: int) -> Tensor:
    """sizes int64 (B, 2) -> bool (B, S, S), True on real pixels."""
    index = torch.arange(image_size, device=sizes.device)
    rows, columns = index < sizes[:, :1], index < sizes[:, 1:]  # (B, S) each
    return rows[:, :, None] & columns[:, None, :]


def padded_images(images: Tensor, valid: Tensor, pixel_mean: Tensor) -> Tensor:
    """images (B, 3, S, S) -> float32 with ``pixel_mean`` (3, 1, 1) in the padding.

    SAM pads after normalising, with 0: that is the mean before normalising.
    """
    return torch.where(valid[:, None], images.float(), pixel_mean)
