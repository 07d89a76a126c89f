# SPDX-License-Identifier: Apache-2.0
"""Images in tiles that overlap: their places, their weights, and one map from the maps of all.

Where tiles overlap, the map is the mean of theirs, weighted by straight ramps that sum to 1; where
they do not, it is that of the one tile. Lines of tiles are done from top to bottom, so that no more
than one line of maps is in memory, whatever the image's height.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

LEAST = 16  # pixels of a tile's side


class Tile(NamedTuple):
    """Pixels top to bottom - 1 and left to right - 1 of an image."""

    top: int
    left: int
    bottom: int
    right: int

    def of(self, values: np.ndarray) -> np.ndarray:
        """A copy of these pixels of (H, W, ...)."""
        return np.array(values[self.top : self.bottom, self.left : self.right])


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis: evenly, with at least ``overlap`` pixels in common."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return np.linspace(0, length - tile, count).round().astype(int).tolist()


def ramps(begins: Sequence[int], tile: int) -> list[np.ndarray]:
    """float32 (tile,) of each tile along an axis: 1, and rising where a neighbour overlaps it."""
    found = []
    inside = np.arange(tile, dtype=np.float32) + 0.5
    for i, begin in enumerate(begins):
        weight = np.ones(tile, np.float32)
        if i:
            weight = np.minimum(weight, inside / max(begins[i - 1] + tile - begin, 0.5))
        if i + 1 < len(begins):
            common = begin + tile - begins[i + 1]
            weight = np.minimum(weight, (tile - inside) / max(common, 0.5))
        found.append(weight)
    return found


def blended(
    size: tuple[int, int],
    tile: int,
    overlap: int,
    maps_of: Callable[[list[Tile]], Iterator[np.ndarray]],
) -> Iterator[np.ndarray]:
    """The map of an image in strips from top to bottom, float32 (C, rows, W).

    size: (height, width)   maps_of: gives of each tile of a line a map, float (C, *its size)
    """
    height, width = size
    tops, lefts = starts(height, tile, overlap), starts(width, tile, overlap)
    high, wide = min(tile, height), min(tile, width)
    down, across = ramps(tops, high), ramps(lefts, wide)
    total = np.zeros((0, high, width), np.float32)  # the first tile says how many channels
    weight = np.zeros((high, width), np.float32)
    for i, top in enumerate(tops):
        line = [Tile(top, left, top + high, left + wide) for left in lefts]
        for own, part, values in zip(line, across, maps_of(line), strict=True):
            if not len(total):
                total = np.zeros((len(values), high, width), np.float32)
            share = down[i][:, None] * part
            total[:, :, own.left : own.right] += share * values
            weight[:, own.left : own.right] += share
        done = tops[i + 1] - top if i + 1 < len(tops) else high
        yield total[:, :done] / weight[:done]
        for array in (total, weight):
            array[..., : high - done, :] = array[..., done:, :].copy()
            array[..., high - done :, :] = 0


def count_of(size: tuple[int, int], tile: int, overlap: int) -> int:
    """How many tiles an image of (height, width) has."""
    return len(starts(size[0], tile, overlap)) * len(starts(size[1], tile, overlap))


def tiles_of(size: tuple[int, int], tile: int, overlap: int) -> list[Tile]:
    """All tiles of an image of (height, width), line by line."""
    high, wide = min(tile, size[0]), min(tile, size[1])
    tops, lefts = (starts(length, tile, overlap) for length in size)
    return [Tile(top, left, top + high, left + wide) for top in tops for left in lefts]


def chosen_tiles(
    tile: int | None, overlap: int | None, kept: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """(tile, overlap) in pixels; None for whole images, which a tile of 0 says.

    kept: those of the training, where ``tile`` is None   overlap: a quarter of the tile if None
    Raises ValueError for no tiles, or an overlap that tiles of this size cannot have.
    """
    if tile is None and kept is not None:
        tile, overlap = kept[0], kept[1] if overlap is None else overlap
    if not tile:
        if overlap is not None:
            raise ValueError(f"overlap is {overlap}, but only tiles overlap; give --tile")
        return None
    if tile < LEAST:
        raise ValueError(f"tile is {tile}; it must be at least {LEAST}, or 0 for whole images")
    overlap = tile // 4 if overlap is None else overlap
    if 2 * overlap > tile:
        raise ValueError(f"overlap is {overlap}; of tiles of {tile} it is at most {tile // 2}")
    return tile, overlap


def said_of_tiles(kept: tuple[int, int], overlap: int | None) -> str:
    """What evaluation and prediction say of the training's tiles, which they take."""
    tiles = chosen_tiles(None, overlap, kept)
    assert tiles is not None, kept
    tile, own = tiles
    return (
        f"tiles of {tile} pixels, overlapping by {own}, as in training; --tile 0 uses whole images"
    )
