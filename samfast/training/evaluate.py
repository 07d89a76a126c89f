# SPDX-License-Identifier: Apache-2.0
"""Masks at the files' own size, and their scores against the truth."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samfast.training.data import Batch, Collate, PairDataset
from samfast.training.folders import Pair
from samfast.training.foreground import Foreground
from samfast.training.image_options import ImageOptions
from samfast.training.metrics import ForegroundScores
from samfast.training.stopping import ignore_signals

_AS_TAGGED = ImageOptions()


def full_size_mask(logits: Tensor, height: int, width: int, shape: Sequence[int]) -> Tensor:
    """logits (S, S), of which (height, width) are real -> bool of ``shape`` (H, W).

    The logits, not the mask, are resized (bilinear), so that edges stay smooth.
    """
    return full_size(logits[None], height, width, shape)[0] > 0


def full_size(maps: Tensor, height: int, width: int, shape: Sequence[int]) -> Tensor:
    """maps (C, S, S), of which (height, width) are real -> (C, *shape), bilinear."""
    real = maps[None, :, :height, :width]
    return F.interpolate(real, size=tuple(shape), mode="bilinear", align_corners=False)[0]


def validation_loader(
    pairs: Sequence[Pair],
    image_size: int,
    batch_size: int,
    foreground: Foreground = None,
    workers: int = 0,
    prompt: str = "none",
    options: ImageOptions = _AS_TAGGED,
    ignore: Sequence[float] = (),
) -> DataLoader:
    """Load batches in the pairs' order, without flips, with the truth at its own size.

    With ``prompt`` "box", with the boxes of the truths, none of them moved; with "point", with the
    deepest point of each.
    """
    return DataLoader(
        PairDataset(
            pairs,
            image_size,
            foreground=foreground,
            ignore=ignore,
            prompt=prompt,
            options=options,
        ),
        batch_size=batch_size,
        collate_fn=Collate(image_size, truths=True),
        num_workers=workers,
        worker_init_fn=ignore_signals,
    )


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without gradients; restore its mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@torch.no_grad()
def predicted_masks(model: nn.Module, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (prediction, truth) of every image, bool (H, W), on the model's device; in eval
    mode."""
    for predicted, truth, _ in judged_masks(model, loader):
        yield predicted, truth


@torch.no_grad()
def judged_masks(
    model: nn.Module, loader: DataLoader
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """``predicted_masks``, each with what counts nowhere, bool (H, W); None where all counts."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for batch in loader:
            yield from judged_of(batch, logits_of(model, batch, device)[0])
    finally:
        model.train(training)


def logits_of(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits (B, S, S) and valid bool (B, S, S) of a batch."""
    boxes = None if batch.boxes is None else batch.boxes.to(device)
    return model(batch.images.to(device), batch.sizes.to(device), boxes, batch.names)


def masks_of(batch: Batch, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(prediction, truth) of every image of a batch, bool (H, W), on the logits' device."""
    for one, (height, width), truth in zip(logits, batch.sizes.tolist(), batch.truths, strict=True):
        yield full_size_mask(one, height, width, truth.shape), truth.to(logits.device)


def judged_of(batch: Batch, logits: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """``masks_of``, each with what counts nowhere, bool (H, W); None where all counts."""
    ignored: Sequence[Tensor | None] = batch.truths_ignored or [None] * len(batch.truths)
    for (predicted, truth), own in zip(masks_of(batch, logits), ignored, strict=True):
        yield predicted, truth, None if own is None else own.to(logits.device)


def counted(
    predicted: Tensor, truth: Tensor, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prediction and truth, both bool (H, W), or (pixels,) of those that are not ignored."""
    return (predicted, truth) if ignored is None else (predicted[~ignored], truth[~ignored])


def evaluate(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """(Dice, IoU) of the foreground over a validation loader, in every process."""
    scores = ForegroundScores(next(model.parameters()).device)
    for judged in judged_masks(model, loader):
        scores.update(*counted(*judged))
    return scores.compute()
