# SPDX-License-Identifier: Apache-2.0
"""The sizes of the image encoders. All share one prompt encoder and mask decoder."""

import difflib
import operator
from dataclasses import dataclass
from typing import Any

PATCH = 16
MOST_PIXELS = 2**15  # per side; its positions already take gigabytes
CHANNELS = 256  # of the image embedding and of every prompt token


@dataclass(frozen=True)
class Architecture:
    """An image encoder: `global_blocks` attend to the whole map, the others inside windows."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int = 14
    image_size: int = 1024
    patch: int = PATCH


ARCHITECTURES = {
    "vit_tiny": Architecture(192, 6, 3, (2, 5), window=7, image_size=256),
    "vit_b": Architecture(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": Architecture(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": Architecture(1280, 32, 16, (7, 15, 23, 31)),
    "sam3": Architecture(1024, 32, 16, (7, 15, 23, 31), window=24, image_size=1008, patch=14),
}


def architecture(name: str) -> Architecture:
    """Return the sizes of model `name`; raise ValueError with the known names, nearest first."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]

    def nearness(known: str) -> float:
        return difflib.SequenceMatcher(None, str(name).lower(), known).ratio()

    known = ", ".join(sorted(ARCHITECTURES, key=nearness, reverse=True))
    raise ValueError(f"unknown model {name!r}; the models are {known}")


def check_image_size(size: Any) -> int:
    """Return `size` as an int; raise ValueError unless it is a positive multiple of 16."""
    try:
        number = operator.index(size)
    except TypeError:
        number = 0
    if number <= 0 or number % PATCH:
        raise ValueError(f"image size {size!r} is not a positive multiple of {PATCH}")
    if number > MOST_PIXELS:
        raise ValueError(f"image size {number} is above {MOST_PIXELS}, the largest supported size")
    return number
