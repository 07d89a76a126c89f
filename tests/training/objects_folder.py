# SPDX-License-Identifier: Apache-2.0
"""A data folder of label images: two bright discs of different colours in each."""

from pathlib import Path

import numpy as np
from PIL import Image

NUMBERS = (3, 7)  # of the two objects of each image


def discs(seed: int, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A noisy RGB picture, uint8 (side, side, 3), and the numbers of its objects, uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.uint8)
    image = rng.integers(0, 60, (side, side, 3))
    for number, left in zip(NUMBERS, (0, side // 2), strict=True):
        radius = rng.integers(side // 9, side // 6)
        cy = rng.integers(radius, side - radius)
        cx = left + rng.integers(radius, side // 2 - radius)
        inside = (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
        labels[inside] = number
        image[inside] += 150
    return image.astype(np.uint8), labels


def fill_with_objects(folder: Path, count: int = 6, empty: tuple[int, ...] = ()) -> Path:
    """images/ and masks/ of p0, p1, …; those in ``empty`` have no object."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        image, labels = discs(i)
        if i in empty:
            labels[:] = 0
        Image.fromarray(image).save(folder / "images" / f"p{i}.png")
        Image.fromarray(labels).save(folder / "masks" / f"p{i}.png")
    return folder
