# SPDX-License-Identifier: Apache-2.0
"""Objects in large photographs by prompts: each is predicted in a tile around its prompt.

A prompt goes to that of the tiles which hold all of it in whose middle it lies; where none holds
it, to a tile of its own. So tiles with several objects are encoded once.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from samfast.training.data import resize_image
from samfast.training.evaluate import scoring
from samfast.training.object_prompts import ObjectPrompt, Prompts
from samfast.training.prompted_data import ObjectCollate, unprompted
from samfast.training.prompted_predict import object_masks
from samfast.training.prompted_scores import LabelMap
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.stacks import Source
from samfast.training.tiles import Tile, tiles_of

Places = dict[Tile, list[int]]  # the numbers of the prompts that each tile has


def places_of(
    prompts: Prompts, shapes: Mapping[Source, tuple[int, int]], tile: int, overlap: int
) -> dict[Source, Places]:
    """The tiles of each image that have prompts. shapes: (height, width) of each image

    Raises ValueError for a prompt that is larger than a tile.
    """
    found: dict[Source, Places] = {}
    for path, own in prompts.items():
        tiles, places = tiles_of(shapes[path], tile, overlap), found.setdefault(path, {})
        for number, prompt in enumerate(own):
            low, high = _extent(prompt)
            if (high - low > tile).any():
                wide, tall = high - low
                raise ValueError(
                    f"the prompt of object {number + 1} of {path} is {wide:g}x{tall:g} pixels, but "
                    f"a tile has {tile}; give a larger --tile, or --tile 0 for whole images"
                )
            places.setdefault(_tile_for(low, high, tiles, shapes[path]), []).append(number)
    return found


def objects_in_tiles(
    model: PromptedSegmenter,
    image: np.ndarray,
    prompts: Sequence[ObjectPrompt],
    places: Places,
    side: int,
    batch_size: int,
) -> np.ndarray:
    """int32 (H, W): object i of the prompts is i + 1, the smaller on top.

    image: uint8 (H, W, 3)   places: of this image   side: of the model's images
    """
    device = next(model.parameters()).device
    collate, found, tiles = ObjectCollate(side), LabelMap(image.shape[:2]), list(places)
    with scoring(model):
        for first in range(0, len(tiles), batch_size):
            some = tiles[first : first + batch_size]
            crops = [unprompted(resize_image(tile.of(image), side), None, None) for tile in some]
            batch = collate(crops)
            embeddings = model.embeddings(batch.images.to(device), batch.sizes.to(device))
            for tile, embedding in zip(some, embeddings.split(1), strict=True):
                for number, mask in _masks(model, embedding, prompts, places[tile], tile, side):
                    found.add(mask, number + 1, tile)
    return found.labels


def _masks(
    model: PromptedSegmenter,
    embedding: torch.Tensor,
    prompts: Sequence[ObjectPrompt],
    numbers: Sequence[int],
    tile: Tile,
    side: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the prompt, bool mask at the tile's size) of each prompt of a tile."""
    own = [_moved(prompts[number], tile) for number in numbers]
    shape = tile.bottom - tile.top, tile.right - tile.left
    yield from zip(numbers, object_masks(model, embedding, own, shape, side), strict=True)


def _extent(prompt: ObjectPrompt) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest (x, y) of a prompt."""
    corners = np.empty((0, 2)) if prompt.box is None else prompt.box.reshape(2, 2)
    places = np.concatenate([corners, prompt.points[:, :2]])
    return places.min(0), places.max(0)


def _tile_for(
    low: np.ndarray, high: np.ndarray, tiles: Sequence[Tile], shape: tuple[int, int]
) -> Tile:
    middle = (low + high) / 2
    holding = [
        t
        for t in tiles
        if t.left <= low[0] and t.top <= low[1] and high[0] <= t.right and high[1] <= t.bottom
    ]
    if holding:
        return min(holding, key=lambda t: max(abs(_middle(t) - middle)))
    (height, width), size = shape, np.array(_size(tiles[0]))
    left, top = np.clip(middle - size / 2, 0, np.array([width, height]) - size).round().astype(int)
    return Tile(int(top), int(left), int(top + size[1]), int(left + size[0]))


def _size(tile: Tile) -> tuple[int, int]:
    return tile.right - tile.left, tile.bottom - tile.top


def _middle(tile: Tile) -> np.ndarray:
    return np.array([tile.left + tile.right, tile.top + tile.bottom]) / 2


def _moved(prompt: ObjectPrompt, tile: Tile) -> ObjectPrompt:
    """The prompt in pixels of the tile."""
    corner = np.array([tile.left, tile.top], float)
    points = prompt.points.astype(float)
    points[:, :2] -= corner
    box = None if prompt.box is None else prompt.box - np.tile(corner, 2)
    return ObjectPrompt(box, points)
