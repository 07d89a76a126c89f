# SPDX-License-Identifier: Apache-2.0
"""Masks of prompted objects at the files' own size, and their scores; so many at a time."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from samfast.models import image_size
from samfast.models.prompted import FirstPrompts
from samfast.training.corrective_clicks import deepest_click
from samfast.training.evaluate import full_size_mask, scoring
from samfast.training.metrics import MeanLoss
from samfast.training.objects import Objects
from samfast.training.prompted_data import ObjectBatch, ResizedObjects, exact_prompt
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.scored import Tick
from samfast.training.tiles import Tile

AT_ONCE = 8  # objects, where decoder_chunk says nothing
OneLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def kinds_of(prompt: str) -> tuple[str, ...]:
    """The kinds of prompts that ``prompt`` trains with."""
    return ("box", "point") if prompt == "mixed" else (prompt,)


class ObjectScores(NamedTuple):
    """What scoring found.

    iou: of each kind of prompt the mean over objects, of the first round
    rounds: the mean over objects and kinds of the last round's IoU
    loss: the mean over objects and kinds   images: (objects, mean IoU or None) of each image
    """

    iou: dict[str, float]
    rounds: float
    loss: float | None
    images: list[tuple[int, float | None]]


def score_objects(
    model: PromptedSegmenter,
    loader: DataLoader,
    kinds: tuple[str, ...],
    rounds: int = 1,
    loss: OneLoss | None = None,
    tick: Tick | None = None,
) -> ObjectScores:
    """The scores of all objects of a loader of ``ScoredObjects``; of every process, but images.

    Prompts are exact boxes and deepest points, so the same in every run. loss: of one object, over
    those of which the model's size leaves a pixel; None: no loss
    """
    device = next(model.parameters()).device
    means = {kind: MeanLoss(device) for kind in kinds}
    last, losses, images = MeanLoss(device), MeanLoss(device), []
    with scoring(model):
        for batch in loader:
            for one in _images(model, batch, device):
                first = [
                    _score_image(model, one, kind, rounds, loss, (means[kind], last, losses))
                    for kind in kinds
                ]
                images.append([iou for own in first for iou in own])
            if tick is not None:
                tick(len(batch.images))
    return ObjectScores(
        {kind: mean.compute() for kind, mean in means.items()},
        last.compute(),
        None if loss is None else losses.compute(),
        [_of_image(own, len(kinds)) for own in images],
    )


class _Image(NamedTuple):
    """An image of a batch: its embedding (1, 256, n, n), and its objects."""

    embedding: Tensor
    objects: Objects
    resized: ResizedObjects


def _images(model: PromptedSegmenter, batch: ObjectBatch, device: torch.device) -> Iterator[_Image]:
    """Each image of a batch, encoded with it."""
    embeddings = model.embeddings(batch.images.to(device), batch.sizes.to(device), batch.names)
    side = batch.images.shape[-1]
    for embedding, objects in zip(embeddings.split(1), batch.objects, strict=True):
        yield _Image(embedding, objects, ResizedObjects(objects, side))


def _score_image(
    model: PromptedSegmenter,
    image: _Image,
    kind: str,
    rounds: int,
    loss: OneLoss | None,
    means: tuple[MeanLoss, MeanLoss, MeanLoss],
) -> list[Tensor]:
    """The IoU of each object after its first prompt; all it finds goes to the means."""
    mean, last, losses = means
    step, count, found = model.decoder_chunk or AT_ONCE, len(image.objects), []
    for begin in range(0, count, step):
        chosen = range(begin, min(begin + step, count))
        own = []
        for logits, truth in _rounds(model, image, kind, chosen, rounds):
            own.append([_iou(one, image, i) for one, i in zip(logits, chosen, strict=True)])
            if loss is not None:
                _add_losses(losses, loss, logits, truth, image.resized.size)
        found += own[0]
        for iou in own[0]:
            mean.update(iou)
        for iou in own[-1]:
            last.update(iou)
    return found


def _rounds(
    model: PromptedSegmenter, image: _Image, kind: str, chosen: range, rounds: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (m, S, S) of each round, and the truth (m, S, S) at the model's size."""
    device, side = image.embedding.device, image_size(model.sam)
    height, width = image.resized.size
    truth = np.zeros((len(chosen), side, side), bool)
    for row, i in enumerate(chosen):
        truth[row, :height, :width] = image.resized.mask(i)
    given = [exact_prompt(kind, image.objects.mask(i), (height, width)) for i in chosen]

    def clicks(logits: Tensor) -> Tensor:
        predicted = (logits > 0).cpu().numpy()[:, :height, :width]
        pairs = zip(predicted, truth[:, :height, :width], strict=True)
        found = np.stack([deepest_click(one, own) for one, own in pairs])
        return torch.from_numpy(found).float().to(device)

    first = first_prompts(given, [kind == "box"] * len(given), device)
    known = torch.from_numpy(truth).to(device)
    for own in model.rounds(image.embedding, [len(chosen)], first, rounds, clicks):
        yield own.logits, known


def first_prompts(
    given: list[np.ndarray], is_box: list[bool], device: torch.device
) -> FirstPrompts:
    """Prompts (4,) each, and whether they are boxes, on the device."""
    numbers = np.stack(given).astype(np.float32)
    return FirstPrompts(torch.from_numpy(numbers).to(device), torch.tensor(is_box, device=device))


def _iou(logits: Tensor, image: _Image, i: int) -> Tensor:
    """The IoU of object i at the file's own size, from its logits (S, S)."""
    truth = torch.from_numpy(image.objects.mask(i)).to(logits.device)
    predicted = full_size_mask(logits, *image.resized.size, truth.shape)
    return (predicted & truth).sum().double() / (predicted | truth).sum()


def _add_losses(
    losses: MeanLoss, loss: OneLoss, logits: Tensor, truth: Tensor, size: tuple[int, int]
) -> None:
    """The loss of each object by itself, which has the same bits in every batch."""
    valid = torch.zeros_like(truth)
    valid[:, : size[0], : size[1]] = True
    there = truth.flatten(1).any(1).tolist()
    for parts in zip(logits.split(1), truth.split(1), valid.split(1), there, strict=True):
        if parts[-1]:
            losses.update(loss(*parts[:-1]))


def _of_image(ious: list[Tensor], kinds: int) -> tuple[int, float | None]:
    if not ious:
        return 0, None
    return len(ious) // kinds, torch.stack(ious).mean().item()


class LabelMap:
    """Masks that are put on one map, in whatever order, the smaller on top.

    labels: int32 (H, W), the number of the object in each pixel, 0 for none
    """

    def __init__(self, shape: tuple[int, int]):
        self.labels = np.zeros(shape, np.int32)
        self._areas = np.full(shape, np.iinfo(np.int64).max)

    def add(self, mask: np.ndarray, number: int, tile: Tile | None = None) -> int:
        """Put a mask, bool (H, W), on the map, below an equally large one; returns its area.

        tile: where the mask lies on the map; None for a mask of the whole map
        """
        where = np.s_[:] if tile is None else np.s_[tile.top : tile.bottom, tile.left : tile.right]
        labels, areas = self.labels[where], self._areas[where]
        area = int(mask.sum())
        place = mask & (area < areas)
        labels[place] = number
        areas[place] = area
        return area


def predicted_labels(
    model: PromptedSegmenter, loader: DataLoader, kind: str
) -> Iterator[tuple[Objects, np.ndarray, list[Any]]]:
    """(objects, predicted labels int32 (H, W), IoU of each object) of every image."""
    device = next(model.parameters()).device
    with scoring(model):
        for batch in loader:
            for image in _images(model, batch, device):
                yield _labelled(model, image, kind)


def _labelled(
    model: PromptedSegmenter, image: _Image, kind: str
) -> tuple[Objects, np.ndarray, list[Any]]:
    found, ious = LabelMap(image.objects.size), []
    step, count = model.decoder_chunk or AT_ONCE, len(image.objects)
    for begin in range(0, count, step):
        chosen = range(begin, min(begin + step, count))
        for logits, _ in _rounds(model, image, kind, chosen, 1):
            for one, i in zip(logits, chosen, strict=True):
                mask = full_size_mask(one, *image.resized.size, image.objects.size)
                found.add(mask.cpu().numpy(), i + 1)
                ious.append(_iou(one, image, i).item())
    return image.objects, found.labels, ious
