# SPDX-License-Identifier: Apache-2.0
"""Random changes of training images: geometry, which masks follow, and colours.

All random numbers are functions of (seed, pass, index), as for flips. Images are Pillow's, so
torchvision gives the same bits in every loader process.
"""

from dataclasses import dataclass
from math import exp, log
from types import ModuleType

import numpy as np
from PIL import Image, ImageFilter

from samfast.integrations.torchvision import declare_missing_schemas, installed

_STREAM = 5  # keeps these numbers apart from those of flips, boxes, points and objects
_NOISE_STREAM = 6


@dataclass(frozen=True)
class Amounts:
    """Largest changes of an image.

    brightness, contrast, saturation: factors are 1 - amount to 1 + amount
    turn: degrees to either side   scale: 1 / scale to scale   shift: share of each side
    hue: share of the circle of colours   blur: radius in pixels of the model's image, half of the
    images   noise: standard deviation, of 255, half of the images
    """

    brightness: float
    contrast: float
    saturation: float = 0.0
    hue: float = 0.0
    turn: float = 0.0
    scale: float = 1.0
    shift: float = 0.0
    blur: float = 0.0
    noise: float = 0.0


AMOUNTS = {
    "light": Amounts(brightness=0.1, contrast=0.1),
    "strong": Amounts(
        brightness=0.25,
        contrast=0.25,
        saturation=0.25,
        hue=0.02,
        turn=30.0,
        scale=1.25,
        shift=0.1,
        blur=1.0,
        noise=8.0,
    ),
}


@dataclass(frozen=True)
class Change:
    """Changes of one image in one pass; units as in ``Amounts``.

    shift: to the right and down   noise_key: seeds the noise
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    turn: float
    scale: float
    shift: tuple[float, float]
    blur: float
    noise: float
    noise_key: tuple[int, ...]

    @property
    def moves(self) -> bool:
        """True if pixels move, so that masks change too."""
        return (self.turn, self.scale, self.shift) != (0.0, 1.0, (0.0, 0.0))

    def moved(self, values: np.ndarray, fill: int | bool = 0) -> np.ndarray:
        """Turn, scale and shift an image or mask; its size stays.

        values: uint8 (H, W, 3), bilinear; or bool, uint8 or int32 (H, W), nearest neighbour
        fill: value of pixels from outside
        """
        if not self.moves:
            return values
        transforms, picture = _transforms(), values
        if values.dtype == bool:
            picture = values.view(np.uint8)
        way = Image.Resampling.BILINEAR if values.ndim == 3 else Image.Resampling.NEAREST
        height, width = values.shape[:2]
        moved = transforms.affine(
            Image.fromarray(picture),
            angle=self.turn,
            translate=[self.shift[0] * width, self.shift[1] * height],
            scale=self.scale,
            shear=[0.0, 0.0],
            interpolation=way,
            fill=int(fill),
        )
        return np.asarray(moved).view(values.dtype)

    def coloured(self, image: np.ndarray) -> np.ndarray:
        """uint8 (h, w, 3) -> with other brightness, contrast, colours, blur and noise."""
        transforms, picture = _transforms(), Image.fromarray(image)
        picture = transforms.adjust_brightness(picture, self.brightness)
        picture = transforms.adjust_contrast(picture, self.contrast)
        if self.saturation != 1.0:
            picture = transforms.adjust_saturation(picture, self.saturation)
        if self.hue:
            picture = transforms.adjust_hue(picture, self.hue)
        if self.blur:  # Pillow's, for torchvision's is a convolution, whose bits threads may change
            picture = picture.filter(ImageFilter.GaussianBlur(self.blur))
        changed = np.asarray(picture)
        if self.noise:
            noise = np.random.default_rng(self.noise_key).normal(0.0, self.noise, changed.shape)
            changed = np.clip(np.rint(changed + noise), 0, 255).astype(np.uint8)
        return changed


def change_of(kind: str, seed: int, number: int, index: int) -> Change | None:
    """Draw the changes of image ``index`` in pass ``number``; None for kind "none"."""
    if kind == "none":
        return None
    most = AMOUNTS[kind]
    key = (seed, number, index)
    draws = np.random.default_rng((*key, _STREAM)).uniform(-1.0, 1.0, 10).tolist()
    return Change(
        brightness=1 + most.brightness * draws[0],
        contrast=1 + most.contrast * draws[1],
        saturation=1 + most.saturation * draws[2],
        hue=most.hue * draws[3],
        turn=most.turn * draws[4],
        scale=exp(log(most.scale) * draws[5]),
        shift=(most.shift * draws[6], most.shift * draws[7]),
        blur=most.blur * max(0.0, draws[8]),
        noise=most.noise * max(0.0, draws[9]),
        noise_key=(*key, _NOISE_STREAM),
    )


def check_augment(kind: str) -> None:
    """Raise ImportError if ``kind`` needs torchvision and it is not installed."""
    if kind != "none" and not installed("torchvision"):
        raise ImportError(
            f"augment {kind} needs torchvision, which is not installed: "
            'pip install "samfast[train]", or leave out --augment'
        )


def _transforms() -> ModuleType:
    """torchvision's functions on pictures, imported where one is needed."""
    declare_missing_schemas()
    from torchvision.transforms.v2 import functional

    return functional
