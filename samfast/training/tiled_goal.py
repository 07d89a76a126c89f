# SPDX-License-Identifier: Apache-2.0
"""Goals whose images are cut into tiles of full resolution, in place of being shrunk.

Images are split into those for training and for validation, never tiles. Each tile is trained on
as an image is. The maps of a validation image's tiles are blended into one map of the whole image,
as prediction does, and scores are of that. ``val_loss`` is the mean over tiles.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from samfast.training.decoded import Decoded
from samfast.training.evaluate import full_size
from samfast.training.folders import Split
from samfast.training.image_options import ImageOptions
from samfast.training.settings import FinetuneSettings
from samfast.training.stopping import ignore_signals
from samfast.training.tiled_data import Arrays, Cut
from samfast.training.tiles import Tile, blended, chosen_tiles, tiles_of

LINES = 1024  # of a whole mask that are in memory together
_SHOWN = 2048  # pixels of the longest side of a picture


class Strip(NamedTuple):
    """Some lines of the blended map of an image. maps: float32 (C, lines, W)"""

    item: Any
    lines: slice
    maps: Tensor


if TYPE_CHECKING:

    class _Goal:
        """The goal behind ``Tiled``, of whole images."""

        settings: FinetuneSettings
        options: ImageOptions
        split: Split[Any]

        def __init__(self, settings: FinetuneSettings, *more: Any, **others: Any) -> None: ...
        def check(self) -> None:
            """See ``Goal``."""

        def sentences(self) -> Iterator[str]:
            """See ``Goal``."""
            yield ""

        def remembered(self) -> dict[str, Any]:
            """See ``Goal``."""
            return {}

else:
    _Goal = object


class Tiled(_Goal):
    """What goals of tiles have in common; a base in front of a goal.

    decoded: where images and masks are kept, which is set before ``check``
    """

    decoded: Decoded
    decoding_threads: int | None = 1  # images are large

    def __init__(self, settings: FinetuneSettings, *more: Any, **others: Any):
        super().__init__(settings, *more, **others)
        tiles = chosen_tiles(settings.tile, settings.overlap)
        assert tiles is not None, settings.tile
        self.tile, self.overlap = tiles
        self._views: dict[str, list[Cut]] = {}

    @property
    def arrays(self) -> Arrays:
        return Arrays(self.decoded, self.options)

    def check(self) -> None:
        """As for whole images; then every file is decoded onto the disk and cut."""
        super().check()
        for part in ("train", "val"):
            self._views[part] = self._cuts(getattr(self.split, part))
        everything = self._views["train"]
        filled = [cut for cut in everything if self.holds_something(cut)]
        if not self.settings.empty_tiles:
            self._views["train"] = filled
        if everything and not filled and not self.settings.empty_tiles:
            raise ValueError(
                f"none of the {len(everything)} training tiles has foreground or an object; leave "
                "out --no-empty-tiles"
            )
        self.empty = len(everything) - len(filled)

    def _cuts(self, items: Sequence[Any]) -> list[Cut]:
        arrays = self.arrays
        return [
            Cut(item, tile)
            for item in items
            for tile in tiles_of(arrays.size(item), self.tile, self.overlap)
        ]

    def holds_something(self, cut: Cut) -> bool:
        """Whether a tile has foreground, an object, or a value; of classes, another than 0."""
        raise NotImplementedError

    def views(self, part: str) -> Sequence[Cut]:
        return self._views[part]

    def steady(self) -> int:
        return 0 if self.settings.changes_images else len(self._views["train"])

    def sentences(self) -> Iterator[str]:
        yield from super().sentences()
        train, val = (len(self._views[part]) for part in ("train", "val"))
        kept = "among them" if self.settings.empty_tiles else "left out"
        yield (
            f"tiles of {self.tile} pixels that overlap by at least {self.overlap}: {train} of "
            f"training images ({self.empty} empty ones {kept}) and {val} of validation images; "
            "each counts as an image; scores are for the reassembled images"
        )

    def remembered(self) -> dict[str, Any]:
        return {**super().remembered(), "tile": self.tile, "overlap": self.overlap}

    def _loader(
        self, data: Dataset[Any], batch_size: int, collate: Callable[[Any], Any], workers: int
    ) -> DataLoader:
        return DataLoader(
            data,
            batch_size=batch_size,
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=ignore_signals,
        )

    def strips(self, cuts: Sequence[Cut], maps: Iterator[np.ndarray]) -> Iterator[Strip]:
        """The blended maps of each image. maps: of each cut, in their order, float (C, h, w)"""
        for item in {id(cut.item): cut.item for cut in cuts}.values():
            top = 0
            size = self.arrays.size(item)
            for strip in blended(size, self.tile, self.overlap, lambda t: islice(maps, len(t))):
                lines = slice(top, top + strip.shape[1])
                yield Strip(item, lines, torch.from_numpy(strip))
                top = lines.stop

    def lines_of(self, height: int) -> Iterator[slice]:
        """The lines of an image of this height, as many at a time as are in memory together."""
        for top in range(0, height, LINES):
            yield slice(top, min(height, top + LINES))

    def shown(self, item: Any) -> tuple[int, np.ndarray]:
        """Every how many pixels are drawn, and these of an image, uint8 (h, w, 3)."""
        image = self.arrays.image(item)
        step = -(-max(image.shape[:2]) // _SHOWN)
        return step, np.array(image[::step, ::step])


def at_size(maps: Tensor, size: Sequence[int], tile: Tile) -> np.ndarray:
    """Maps (C, S, S) of a tile at its own size."""
    shape = tile.bottom - tile.top, tile.right - tile.left
    return full_size(maps, size[0], size[1], shape).float().cpu().numpy()
