# SPDX-License-Identifier: Apache-2.0
"""A data folder of stacks: bright rectangles that move from slice to slice."""

from pathlib import Path

import numpy as np
from PIL import Image


def volume(seed: int, slices: int, height: int = 40, width: int = 48):
    """A noisy grey volume, uint8 (slices, height, width), and its objects' numbers, uint8."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((slices, height, width), np.uint8)
    for i, own in enumerate(labels):
        own[4 + i : 16 + i, 4:18] = 1
        own[20:32, 24 + i : 36 + i] = 2
    image = rng.integers(0, 80, labels.shape) + 150 * (labels > 0)
    return image.astype(np.uint8), labels


def write_stack(path: Path, pages) -> Path:
    """A .npy file, or a TIFF with these pages."""
    if path.suffix == ".npy":
        np.save(path, np.asarray(pages))
        return path
    first, *rest = [Image.fromarray(page) for page in pages]
    first.save(path, save_all=True, append_images=rest, compression="tiff_lzw")
    return path


def fill_with_stacks(folder: Path, slices=(3, 2, 1, 4), binary: bool = True) -> Path:
    """images/ and masks/ of v0, v1, …: TIFF, every second image and third mask in .npy."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i, count in enumerate(slices):
        image, labels = volume(i, count)
        labels = 255 * (labels > 0).astype(np.uint8) if binary else labels
        write_stack(folder / "images" / f"v{i}{('.tif', '.npy')[i % 2]}", image)
        write_stack(folder / "masks" / f"v{i}{('.tif', '.tif', '.npy')[i % 3]}", labels)
    return folder
