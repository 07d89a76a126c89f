# SPDX-License-Identifier: Apache-2.0
"""Tiles of images and of their masks as samples."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from samfast.training.data import MaskDataset
from samfast.training.decoded import Decoded
from samfast.training.folders import Pair
from samfast.training.foreground import Foreground
from samfast.training.image_options import ImageOptions
from samfast.training.images import read_image, read_mask
from samfast.training.object_maps import object_maps
from samfast.training.task_data import TargetDataset, truth_of
from samfast.training.task_files import read_stored
from samfast.training.task_items import Item
from samfast.training.tasks import TaskSpec
from samfast.training.tiles import Tile

_MAPS = ("centre", "depth")


class Cut(NamedTuple):
    """A tile of an image. item: a Pair or an Item"""

    item: Any
    tile: Tile

    @property
    def stem(self) -> str:
        return f"{self.item.stem} at {self.tile.left},{self.tile.top}"

    @property
    def targets(self) -> dict[str, Any]:
        return self.item.targets


class Arrays:
    """The decoded images and masks of pairs or items."""

    def __init__(self, decoded: Decoded, options: ImageOptions):
        self.decoded = decoded
        self.options = options

    def image(self, item: Pair | Item) -> np.ndarray:
        """uint8 (H, W, 3)"""
        read = partial(read_image, item.image, self.options)
        return self.decoded.array(item.image, "image", read)

    def size(self, item: Pair | Item) -> tuple[int, int]:
        """(height, width)"""
        height, width = self.image(item).shape[:2]
        return height, width

    def mask(self, pair: Pair, rule: Foreground, ignore: Sequence[float]) -> np.ndarray:
        """What ``read_mask`` says of a pair's mask."""
        read = partial(read_mask, pair.mask, rule, tuple(ignore))
        return self.decoded.array(pair.image, "mask", read)

    def stored(self, item: Item, spec: TaskSpec) -> np.ndarray:
        """What ``read_stored`` says of a task's file."""
        path = item.targets[spec.name]
        kind = "objects" if spec.of_objects else spec.kind if not spec.labels else "labels"
        name = f"{kind} {path} {spec.rule} {spec.ignore}"
        return self.decoded.array(item.image, name, partial(read_stored, spec, path))

    def truth_lines(self, item: Item, spec: TaskSpec, lines: slice) -> np.ndarray:
        """Some lines of the truth of a task, as ``truth_of`` makes it of the whole image."""
        if spec.of_objects:
            if spec.kind == "binary":  # of a pixel by itself
                labels = np.asarray(self.stored(item, spec)[lines])
                return np.where(labels < 0, np.int32(-1), (labels > 0).astype(np.int32))
            made = self.decoded.array(item.image, "maps", partial(_maps, self.stored(item, spec)))
            values = np.array(made[_MAPS.index(spec.object_map), lines])
            return spec.scale * values[None] + np.float32(spec.offset)
        stored = self.stored(item, spec)
        if spec.derive is None:  # of a pixel by itself
            return truth_of(spec, np.asarray(stored[lines]))
        name = f"truth {spec.name}"
        whole = self.decoded.array(item.image, name, partial(truth_of, spec, stored))
        return np.array(whole[..., lines, :])


def _maps(labels: np.ndarray) -> np.ndarray:
    """float32 (2, H, W): both at once, for they take the same work."""
    maps = object_maps(labels)
    return np.stack([maps[name] for name in _MAPS])


class TiledPairs(MaskDataset[Cut]):
    """``MaskDataset`` of tiles, which a sample's name tells apart."""

    def __init__(self, cuts: Sequence[Cut], image_size: int, arrays: Arrays, **more: Any):
        super().__init__(cuts, image_size, options=arrays.options, **more)
        self.arrays = arrays

    def read(self, pair: Cut, number: int) -> tuple[np.ndarray, np.ndarray, str | None]:
        item, tile = pair
        image = tile.of(self.arrays.image(item))
        values = tile.of(self.arrays.mask(item, self.foreground, self.ignore))
        return image, values, None if self.changes else f"{item.image} {tuple(tile)}"


class TiledItems(TargetDataset[Cut]):
    """``TargetDataset`` of tiles; what is derived of masks is derived of each tile by itself."""

    def __init__(
        self,
        cuts: Sequence[Cut],
        specs: Sequence[TaskSpec],
        image_size: int,
        arrays: Arrays,
        **more: Any,
    ):
        super().__init__(cuts, specs, image_size, options=arrays.options, truths=False, **more)
        self.arrays = arrays

    def read_image(self, item: Cut) -> np.ndarray:
        return item.tile.of(self.arrays.image(item.item))

    def read_stored(self, item: Cut, spec: TaskSpec) -> np.ndarray:
        return item.tile.of(self.arrays.stored(item.item, spec))
