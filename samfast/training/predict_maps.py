# SPDX-License-Identifier: Apache-2.0
"""What a model predicts for new photographs, each at its own size."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from samfast.models import image_size
from samfast.training.adapter_settings import PredictSettings
from samfast.training.automatic import automatic_objects, grid_of
from samfast.training.boxes import resized_box
from samfast.training.data import Collate, Sample, resize_image
from samfast.training.evaluate import full_size, logits_of
from samfast.training.image_options import ImageOptions
from samfast.training.images import read_image
from samfast.training.object_prompts import Prompts
from samfast.training.points import resized_point
from samfast.training.predict_tiles import predicted_by_tiles
from samfast.training.progress import Progress
from samfast.training.prompted_predict import predicted_objects
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.prompted_tiles import Places, objects_in_tiles
from samfast.training.remembered import Remembered
from samfast.training.segmenters import SamSegmenter
from samfast.training.stacks import Source
from samfast.training.task_scores import predicted_tasks, read_off
from samfast.training.tiles import chosen_tiles, count_of


def predicted_maps(
    settings: PredictSettings,
    model: SamSegmenter,
    kept: Remembered,
    shapes: dict[Source, tuple[int, int]],
    boxes: Sequence[np.ndarray] = (),
    objects: Prompts | None = None,
    places: dict[Source, Places] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """What each image is predicted at its size, by task; of one mask under ""; or label images of
    objects under "objects", int32 (H, W). Probabilities, where they are asked for, as ``read_off``
    names them.

    shapes: (height, width) of each image   boxes: one of each, or points, or none
    objects: the prompts of single objects, for a PromptedSegmenter   places: their tiles, if any
    """
    paths = list(shapes)
    if settings.automatic:
        for path in paths:
            found = automatic_objects(
                model.sam,
                read_image(path, kept.options),
                points_per_batch=settings.decoder_chunk or 64,
                min_size=settings.min_size,
                **grid_of(settings),
            )
            yield {"objects": found}
        return
    if objects is not None:
        assert isinstance(model, PromptedSegmenter), type(model)
        side, batch = image_size(model.sam), settings.batch_size
        if places is not None:
            for path in paths:
                image, own = read_image(path, kept.options), objects[path]
                labels = objects_in_tiles(model, image, own, places[path], side, batch)
                yield {"objects": labels}
            return
        for labels in predicted_objects(model, objects, shapes, side, kept.options, batch):
            yield {"objects": labels}
        return
    if tiles := chosen_tiles(settings.tile, settings.overlap, kept.tiles):
        count = sum(count_of(shape, *tiles) for shape in shapes.values())
        with Progress("prediction, tiles", count, main=True) as progress:
            for path in paths:
                yield predicted_by_tiles(
                    model,
                    read_image(path, kept.options),
                    kept.specs,
                    *tiles,
                    settings.batch_size,
                    progress.advance,
                    settings.probabilities,
                )
        return
    side = image_size(model.sam)
    loader = DataLoader(
        _Photographs(paths, side, boxes, kept.options),
        batch_size=settings.batch_size,
        collate_fn=Collate(side, truths=True),
    )
    if kept.specs:
        yield from predicted_tasks(model, loader, kept.specs, settings.probabilities)
    else:
        yield from _predicted_masks(model, loader, settings.probabilities)


@torch.no_grad()
def _predicted_masks(
    model: nn.Module, loader: DataLoader, probable: bool
) -> Iterator[dict[str, np.ndarray]]:
    """The mask of each image, at its size, as ``read_off`` names it."""
    device = next(model.parameters()).device
    for batch in loader:
        logits = logits_of(model, batch, device)[0]
        for one, size, truth in zip(logits, batch.sizes.tolist(), batch.truths, strict=True):
            yield read_off(None, full_size(one[None], size[0], size[1], truth.shape), probable)


class _Photographs(Dataset):
    """``boxes`` are one of each image, in its file's pixels, or points, or none."""

    def __init__(
        self,
        paths: Sequence[Source],
        side: int,
        boxes: Sequence[np.ndarray],
        options: ImageOptions,
    ):
        self.paths = paths
        self.side = side
        self.boxes = boxes
        self.options = options

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.paths[index], self.options)
        resized = resize_image(image, self.side)
        size, resized_size = image.shape[:2], resized.shape[:2]
        box = resized_prompt(self.boxes[index], size, resized_size) if self.boxes else None
        # No truth: only the sizes of these two count.
        return Sample(resized, np.zeros(resized_size, bool), np.zeros(size, bool), box)


def resized_prompt(prompt: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """A box or a point of an image of size ``before`` resized to ``after``."""
    return (resized_box if len(prompt) == 4 else resized_point)(prompt, before, after)
