# SPDX-License-Identifier: Apache-2.0
"""Real photographs for a demonstration: ancient coins, which scikit-image's wheel carries.

The photograph (Greek coins from Pompeii, Brooklyn Museum, 303 x 384 pixels, grey) is read from the
installed package; nothing is downloaded. Its left part gives overlapping tiles for training, its
right part others for validation, and no coin lies in both.

The truth comes from a classical segmentation that no network takes part in: a watershed on the
edge strength (Sobel), flooded from pixels that are surely background (darker than 30) and surely
coin (brighter than 150); notches and holes are closed, threads and specks removed.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN_COLUMNS = (0, 218)
VAL_COLUMNS = (244, 384)  # the coin cut by column 244 begins at 220, right of all training tiles
TILE = 140
_BACKGROUND_BELOW, _COIN_ABOVE = 30, 150


def coins_and_truth() -> tuple[np.ndarray, np.ndarray]:
    """The photograph, uint8 (303, 384), and its coins, bool of the same shape."""
    from scipy import ndimage
    from skimage import data, filters, morphology, segmentation

    photograph = data.coins()
    markers = np.zeros(photograph.shape, np.int32)
    markers[photograph < _BACKGROUND_BELOW] = 1
    markers[photograph > _COIN_ABOVE] = 2
    coins = segmentation.watershed(filters.sobel(photograph), markers) == 2
    coins = ndimage.binary_closing(coins, morphology.disk(3))
    coins = ndimage.binary_opening(ndimage.binary_fill_holes(coins), morphology.disk(3))
    return photograph, coins


def write_coins(folder: Path | str, *, columns: int = 4, rows: int = 6) -> Path:
    """Write ``train/`` and ``val/`` with ``images/`` and ``masks/`` as PNG; returns the folder.

    Training: columns x rows overlapping square tiles spread over the left part. Validation: the
    right part, cut once into three strips, so that every pixel counts once.
    """
    folder = Path(folder)
    photograph, truth = coins_and_truth()
    height = photograph.shape[0]
    lefts = np.linspace(TRAIN_COLUMNS[0], TRAIN_COLUMNS[1] - TILE, columns).round().astype(int)
    tops = np.linspace(0, height - TILE, rows).round().astype(int)
    boxes = {"train": [(y, y + TILE, x, x + TILE) for y in tops for x in lefts]}
    cuts = np.linspace(0, height, 4).round().astype(int)
    boxes["val"] = [(y0, y1, *VAL_COLUMNS) for y0, y1 in pairwise(cuts)]
    for part, part_boxes in boxes.items():
        for kind, array in (("images", photograph), ("masks", truth.astype(np.uint8) * 255)):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
            for y0, y1, x0, x1 in part_boxes:
                tile = Image.fromarray(array[y0:y1, x0:x1])
                tile.save(folder / part / kind / f"coins_y{y0:03d}_x{x0:03d}.png")
    return folder
