# SPDX-License-Identifier: Apache-2.0
"""Padded images in, maps of logits out: the models that are trained, around a SAM."""

from collections.abc import Callable, Sequence
from typing import TypedDict, cast

import torch
from torch import Tensor, nn

from samfast.models import decode, image_size, pixel_mean, segment
from samfast.models.reading import check_all_read
from samfast.training.data import padded_images, valid_region


class SamSegmenter(nn.Module):
    """A SAM, and how it computes: under autocast of ``dtype`` unless that is float32.

    decoder_chunk: as in ``segment``
    kept: in place of ``encode``, called with the images' names too, see ``keep_embeddings``
    """

    kept: Callable[[nn.Module, Tensor, Sequence[str]], Tensor] | None = None

    def __init__(
        self,
        sam: nn.Module,
        dtype: torch.dtype = torch.float32,
        decoder_chunk: int | None = None,
    ):
        super().__init__()
        self.sam = sam
        self.dtype = dtype
        self.decoder_chunk = decoder_chunk


class Segmenter(SamSegmenter):
    """Binary segmentation: padded images in, one map of logits out, prompted by a box, a
    point or nothing.

    images (B, 3, S, S) uint8, sizes int64 (B, 2), boxes None or float32 (B, 4), or points (B, 3)
    with their labels, names of images that never change or none -> logits float32 (B, S, S), valid
    bool (B, S, S). The map is that of SAM's first mask token, the one for a single mask, with
    prompts and without.
    """

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        boxes: Tensor | None = None,
        names: Sequence[str] = (),
    ) -> tuple[Tensor, Tensor]:
        valid = valid_region(sizes, image_size(self.sam))
        images = padded_images(images, valid, pixel_mean(self.sam))
        lower = self.dtype != torch.float32
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=lower):
            if self.kept is None:
                logits = segment(
                    self.sam, images, **prompts_of(boxes), decoder_chunk=self.decoder_chunk
                )
            else:
                check_all_read(self.sam)
                logits = decode(
                    self.sam,
                    self.kept(self.sam, images, names),
                    (images.shape[2], images.shape[3]),
                    **prompts_of(boxes),
                    decoder_chunk=self.decoder_chunk,
                )
        return logits[:, 0].float(), valid


class Prompts(TypedDict, total=False):
    """Prompts as ``segment`` takes them."""

    boxes: Tensor | None
    points: tuple[Tensor, Tensor]


def prompts_of(given: Tensor | None) -> Prompts:
    """Boxes (B, 4), or points (B, 3) with their labels, as ``segment`` takes them."""
    if given is None or given.shape[1] == 4:
        return {"boxes": given}
    return {"points": (given[:, None, :2], given[:, None, 2].long())}


class TaskSegmenter(SamSegmenter):
    """Several tasks: padded images in, maps of every task out.

    images (B, 3, S, S) uint8, sizes int64 (B, 2), rows: by task, its images -> {task: logits
    float32 (rows, channels, S, S)}.
    """

    def forward(
        self, images: Tensor, sizes: Tensor, rows: dict[str, list[int]]
    ) -> dict[str, Tensor]:
        valid = valid_region(sizes, image_size(self.sam))
        images = padded_images(images, valid, cast("Tensor", self.sam.pixel_mean))
        lower = self.dtype != torch.float32
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=lower):
            logits = self.sam(images, rows, decoder_chunk=self.decoder_chunk)
        return {name: values.float() for name, values in logits.items()}
