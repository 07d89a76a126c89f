# SPDX-License-Identifier: Apache-2.0
"""Samples as windows of images, and where their pixels lie in image-order buffers."""

from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """height × width windows, row by row, of images padded with zeros at the bottom and right.

    Pixel (y, x) of a window is a row of an image-order buffer (tokens, C). Outside the image it is
    a row of a pad buffer (batch · pads, C), which runs through the padded image line by line. Whole
    images are windows of the image's own size.
    """

    batch: int
    image_height: int
    image_width: int
    height: int
    width: int

    @classmethod
    def whole(cls, samples: int, height: int, width: int) -> "Windows":
        return cls(samples, height, width, height, width)

    @property
    def down(self) -> int:
        return -(-self.image_height // self.height)

    @property
    def across(self) -> int:
        return -(-self.image_width // self.width)

    @property
    def samples(self) -> int:
        return self.batch * self.down * self.across

    @property
    def tokens(self) -> int:
        return self.batch * self.image_height * self.image_width

    @property
    def pads(self) -> int:
        """Positions of one image's padding."""
        padded = self.down * self.height * self.across * self.width
        return padded - self.image_height * self.image_width

    def cut(self, image: Tensor, pad: Tensor | None = None) -> Tensor:
        """(tokens, C) and (batch · pads, C), zeros when None -> (samples, height, width, C)."""
        channels = image.shape[-1]
        tall, wide = self.down * self.height, self.across * self.width
        right, below = wide - self.image_width, tall - self.image_height
        image = image.reshape(self.batch, self.image_height, self.image_width, channels)
        if pad is None:
            padded = torch.nn.functional.pad(image, (0, 0, 0, right, 0, below))
        else:
            beside, under = pad.reshape(self.batch, self.pads, channels).split(
                [self.image_height * right, below * wide], dim=1
            )
            beside = beside.reshape(self.batch, self.image_height, right, channels)
            under = under.reshape(self.batch, below, wide, channels)
            padded = torch.cat([torch.cat([image, beside], 2), under], 1)
        parts = padded.reshape(
            self.batch, self.down, self.height, self.across, self.width, channels
        )
        return parts.transpose(2, 3).reshape(self.samples, self.height, self.width, channels)

    def paste(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """(samples, height, width, C) -> (tokens, C) and (batch · pads, C), both fresh."""
        channels = samples.shape[-1]
        tall, wide = self.down * self.height, self.across * self.width
        parts = samples.reshape(
            self.batch, self.down, self.across, self.height, self.width, channels
        )
        padded = parts.transpose(2, 3).reshape(self.batch, tall, wide, channels)
        image = padded[:, : self.image_height, : self.image_width].reshape(-1, channels).clone()
        beside = padded[:, : self.image_height, self.image_width :].flatten(1, 2)
        under = padded[:, self.image_height :].flatten(1, 2)
        return image, torch.cat([beside, under], 1).reshape(-1, channels)
