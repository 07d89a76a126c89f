# SPDX-License-Identifier: Apache-2.0
"""One binary mask per image from the user's dataset instead of a folder.

The dataset's random numbers are seeded for each image and pass. So they do not depend on the number
of loader processes or on resuming.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from samfast.training.chosen_tasks import masks_of
from samfast.training.data import Collate, MaskDataset
from samfast.training.fingerprints import of_arrays
from samfast.training.folders import ADVICE, CheckedPair, Split, listed
from samfast.training.foreground import Foreground, counted_mask
from samfast.training.mask_goal import MaskGoal, baseline_of
from samfast.training.settings import FinetuneSettings
from samfast.training.split_checks import check_foreground
from samfast.training.stopping import ignore_signals

_EIGHT_BITS = ("1", "L", "P", "RGB", "LA", "RGBA", "CMYK", "YCbCr")
PARTS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class Item:
    """An image of a dataset. stem: its part and number, which stand for a file's name"""

    dataset: Any
    part: str
    index: int

    @property
    def stem(self) -> str:
        return f"{self.part}-{self.index:05d}"

    @property
    def image(self) -> Path:
        return Path(self.stem)


class DatasetGoal(MaskGoal[Item]):
    """``MaskGoal`` of a dataset whose items are (image, mask) or have the keys image and mask.

    An image is uint8 (H, W, 3) or (H, W), a uint8 tensor (3, H, W), or a PIL image; a mask is bool
    or whole numbers (H, W), as an array, a tensor or a PIL image. dataset: one, which is split by
    ``val_fraction`` and ``seed``, or {"train": one, "val": another}
    """

    def __init__(self, settings: FinetuneSettings, dataset: Any):
        check_of_dataset(settings)
        super().__init__(settings)
        self.split = _split(dataset, settings.val_fraction, settings.seed)

    def fingerprints(self) -> dict[str, str]:
        items = (*self.split.train, *self.split.val)
        return {item.stem: of_arrays(*read_item(item, self.settings.seed)) for item in items}

    def check(self) -> None:
        """Read every item once and check it, or raise the first broken rule."""
        truths = []
        for part, what in PARTS.items():
            found = []
            for item in getattr(self.split, part):
                _, values = read_item(item, self.settings.seed)
                held = [v for v in np.unique(values).tolist() if v not in self.ignore]
                found.append(CheckedPair(held, False, True, None))
                if part == "val":
                    truths.append(counted_mask(values, self.foreground, self.ignore))
                _check_values(item, found, self.foreground)
            check_foreground(found, self.foreground, what)
        self.remarks = []
        self.baseline = baseline_of(truths)

    def training_data(self, side: int) -> tuple[MaskDataset[Any], Collate]:
        settings = self.settings
        return self._items(
            self.split.train,
            side,
            flips=settings.flips,
            augment=settings.augment,
            box_jitter=settings.box_jitter or 0.0,
            same=False,
        ), Collate(side, truths=False)

    def steady(self) -> int:
        return 0  # the dataset may draw

    def validation_loader(
        self, items: Sequence[Item], side: int, batch_size: int, workers: int = 0
    ) -> DataLoader:
        return DataLoader(
            self._items(items, side),
            batch_size=batch_size,
            collate_fn=Collate(side, truths=True),
            num_workers=workers,
            worker_init_fn=ignore_signals,
        )

    def image_of(self, pair: Item) -> np.ndarray:
        return read_item(pair, self.settings.seed)[0]

    def _items(
        self, items: Sequence[Item], side: int, *, same: bool = True, **more: Any
    ) -> "ItemDataset":
        return ItemDataset(
            items,
            side,
            foreground=self.foreground,
            ignore=self.ignore,
            prompt=self.settings.prompt,
            seed=self.settings.seed,
            same=same,
            **more,
        )


class ItemDataset(MaskDataset[Item]):
    """``MaskDataset`` of ``Item``. same: whether an image is the same in every pass"""

    def __init__(self, items: Sequence[Item], image_size: int, *, same: bool, **more: Any):
        super().__init__(items, image_size, **more)
        self.same = same and not self.changes

    def read(self, pair: Item, number: int) -> tuple[np.ndarray, np.ndarray, str | None]:
        image, values = read_item(pair, self.seed, 0 if self.same else number)
        return image, values, pair.stem if self.same else None


def check_of_dataset(settings: FinetuneSettings) -> None:
    """Raise ValueError for settings that need files."""
    if settings.data is not None:
        raise ValueError(f"data is {settings.data}, but a dataset is given; leave out one of them")
    if settings.output is None and settings.resume in (None, "newest"):
        raise ValueError("a dataset does not name the output folder; set output")
    if (masks := masks_of(settings)) != "binary":
        raise ValueError(f"masks is {masks}, but a dataset has binary masks; leave out masks")
    if settings.tile:
        raise ValueError(
            f"tile is {settings.tile}, but a dataset is given; cut images into tiles there"
        )
    for name in ("tasks", "bands", "mask_suffix"):
        if getattr(settings, name) is not None:
            raise ValueError(f"{name} is about files, but a dataset is given; leave it out")
    if settings.stacks:
        raise ValueError("stacks is about files, but a dataset is given; leave it out")


def read_item(item: Item, seed: int, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 (H, W, 3), mask values (H, W)) of an item, in one pass.

    Raises ValueError, which names the item, for what is neither.
    """
    with _seeded(seed, number, item.index, item.part):
        found = item.dataset[item.index]
    try:
        image, mask = _parts(found)
        image, values = _image(image), _mask(mask)
        if image.size == 0:
            raise ValueError("its image has no pixels")
        if image.shape[:2] != values.shape:
            sizes = " and ".join(f"{a.shape[0]}x{a.shape[1]}" for a in (image, values))
            raise ValueError(f"image and mask are {sizes} (height x width)")
    except ValueError as error:
        raise ValueError(f"item {item.index} of the dataset ({item.part}): {error}") from None
    return image, values


def _split(dataset: Any, val_fraction: float, seed: int) -> Split[Item]:
    if isinstance(dataset, Mapping):
        if set(dataset) != set(PARTS):
            raise ValueError(
                f"the datasets are {', '.join(map(str, dataset))}; expected train and val"
            )
        parts = {part: _items_of(dataset[part], part) for part in PARTS}
        return Split(parts["train"], parts["val"])
    items = _items_of(dataset, "item")
    if len(items) < 2:
        raise ValueError("the dataset has 1 item; training and validation need at least 2")
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    count = min(len(items) - 1, max(1, round(val_fraction * len(items))))
    val = set(order[:count])
    return Split(
        tuple(item for item in items if item.index not in val),
        tuple(item for item in items if item.index in val),
    )


def _items_of(dataset: Any, part: str) -> tuple[Item, ...]:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"the dataset is a {type(dataset).__name__}; expected one with a length and numbered "
            "items, or the datasets train and val"
        )
    if len(dataset) == 0:
        raise ValueError(f"the dataset ({part}) has no items")
    return tuple(Item(dataset, part, index) for index in range(len(dataset)))


def _parts(found: Any) -> tuple[Any, Any]:
    if isinstance(found, Mapping):
        if not {"image", "mask"} <= set(found):
            raise ValueError(f"it has the keys {', '.join(map(str, found))}; expected image, mask")
        return found["image"], found["mask"]
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return found[0], found[1]
    raise ValueError(f"it is a {type(found).__name__}; expected (image, mask)")


def _image(given: Any) -> np.ndarray:
    if isinstance(given, Image.Image):
        given = _rgb(given)
    if isinstance(given, Tensor):
        given = given.cpu().numpy()
        given = given.transpose(1, 2, 0) if given.ndim == 3 else given
    image = np.asarray(given)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"its image is {image.dtype} {image.shape}; expected uint8 with values 0 to 255, "
            "(height, width, 3), or a tensor (3, height, width)"
        )
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Colours of 8 bits; transparency is laid over white, as in files."""
    if image.mode not in _EIGHT_BITS:
        raise ValueError(
            f"its image has PIL's mode {image.mode}; expected one of {', '.join(_EIGHT_BITS)}"
        )
    if image.mode in ("LA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _mask(given: Any) -> np.ndarray:
    values = given.cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.dtype.kind not in "bui" or values.ndim != 2:
        raise ValueError(
            f"its mask is {values.dtype} {values.shape}; expected bool or whole numbers, "
            "(height, width)"
        )
    return values


def _check_values(item: Item, found: list[CheckedPair], rule: Foreground) -> None:
    """Without a rule, all masks together must hold 0 and one other value."""
    values = sorted({value for own in found for value in own.values if value})
    if rule is None and (len(values) > 1 or min(values, default=0) < 0):
        raise ValueError(
            f"the masks up to item {item.index} ({item.part}) hold the values {listed(values)} "
            f"besides 0; {ADVICE}"
        )


@contextmanager
def _seeded(seed: int, number: int, index: int, part: str) -> Iterator[None]:
    """Seed all random numbers by image and pass inside the ``with``."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence((seed, number, index, len(part))).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
