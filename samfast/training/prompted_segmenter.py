# SPDX-License-Identifier: Apache-2.0
"""Padded images and prompts of their objects in, logits of each object and round out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from samfast.models import encode, image_size, pixel_mean
from samfast.models.prompted import FirstPrompts, decode_each
from samfast.models.reading import check_all_read
from samfast.models.segment import upscale
from samfast.training.corrective_clicks import random_clicks
from samfast.training.data import padded_images, valid_region
from samfast.training.segmenters import SamSegmenter

# logits (M, S, S) of a round -> the click on each object, float32 (M, 3)
Clicks = Callable[[Tensor], Tensor]


class Round(NamedTuple):
    """What one round of clicks made of each object.

    logits: float32 (M, S, S)   clicks: float32 (M, P, 3), those that were given; None: none
    """

    logits: Tensor
    clicks: Tensor | None


class PromptedSegmenter(SamSegmenter):
    """Single objects by prompts: the encoder runs once an image, the decoder once an object.

    forward: images (B, 3, S, S) uint8, sizes int64 (B, 2), counts: the objects of each image, first
    prompts of M objects, masks bool (M, S, S), draws (M, rounds - 1), names of images that never
    change or none -> logits float32 (M, S, S) of each round, valid bool (M, S, S).

    decoder_chunk: as in ``decode_each``
    """

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        counts: Sequence[int],
        first: FirstPrompts,
        masks: Tensor,
        draws: Tensor,
        names: Sequence[str] = (),
    ) -> tuple[list[Tensor], Tensor]:
        check_all_read(self.sam)
        regions = valid_region(sizes, image_size(self.sam))
        pairs = zip(regions, counts, strict=True)
        valid = torch.cat([region.expand(count, *region.shape) for region, count in pairs])
        columns = iter(draws.unbind(1))

        def clicks(logits: Tensor) -> Tensor:
            return random_clicks(logits > 0, masks, valid, next(columns))

        rounds = draws.shape[1] + 1
        embeddings = self.embeddings(images, sizes, names)
        found = [own.logits for own in self.rounds(embeddings, counts, first, rounds, clicks)]
        return found, valid

    def embeddings(self, images: Tensor, sizes: Tensor, names: Sequence[str] = ()) -> Tensor:
        """(B, 256, n, n) of images (B, 3, S, S) of these sizes (B, 2)."""
        valid = valid_region(sizes, image_size(self.sam))
        images = padded_images(images, valid, pixel_mean(self.sam))
        with self._autocast(images):
            if self.kept is None:
                return encode(self.sam, images)
            return self.kept(self.sam, images, names)

    def rounds(
        self,
        embeddings: Tensor,
        counts: Sequence[int],
        first: FirstPrompts,
        rounds: int = 1,
        clicks: Clicks | None = None,
        given: Tensor | None = None,
    ) -> Iterator[Round]:
        """Each round's logits; after a round ``clicks`` is asked for the next one's clicks.

        given: clicks of the first round, float32 (M, P, 3)
        A round sees all clicks so far, and the low-resolution logits of the round before.
        """
        side = image_size(self.sam)
        low = None
        for number in range(rounds):
            with self._autocast(embeddings):
                low = decode_each(
                    self.sam, embeddings, counts, first, given, low, chunk=self.decoder_chunk
                )
                logits = _wide(upscale(low, (side, side), side))
            yield Round(logits, given)
            if number + 1 < rounds:
                assert clicks is not None, rounds
                one = clicks(logits.detach())[:, None]
                given = one if given is None else torch.cat([given, one], dim=1)

    @contextmanager
    def _autocast(self, like: Tensor) -> Iterator[None]:
        lower = self.dtype != torch.float32
        with torch.autocast(like.device.type, dtype=self.dtype, enabled=lower):
            yield


def _wide(values: Tensor) -> Tensor:
    """In at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
