# SPDX-License-Identifier: Apache-2.0
"""Scores of a validation set and of each image.

The sums of an image stay on its device, so that only the end of a pass waits for them. A score
without a pixel to count is None.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samfast.training.metrics import class_counts

Tick = Callable[[int], object]  # is told the images of each batch that is done


class Scored(NamedTuple):
    """The scores of a validation set.

    row: the value of each of a goal's columns, over the images of every process
    images: image, task (of several) and scores of each image of this process, in its loader's order
    classes: task, class, name, iou, pixels and predicted of each class, over every process
    """

    row: dict[str, float]
    images: list[dict[str, Any]]
    classes: Sequence[dict[str, Any]] = ()


class DataFacts(NamedTuple):
    """What a model card says about data and scores.

    objects: of the training and of the validation images; None where masks number none
    baseline: what the baseline is   baselines: its scores by column
    """

    objects: tuple[int, int] | None = None
    baseline: str = ""
    baselines: Mapping[str, float] = MappingProxyType({})


def foreground_sums(predicted: Tensor, truth: Tensor) -> Tensor:
    """float64 (4,) of one image: pixels, and those right, only predicted and only in the truth."""
    parts = (torch.ones_like(truth), predicted & truth, predicted & ~truth, truth & ~predicted)
    return torch.stack([part.sum() for part in parts]).double()


def foreground_scores(sums: Sequence[float]) -> dict[str, float | None]:
    """Dice and IoU; both 1 where there is no foreground, in truth and prediction."""
    pixels, right, added, missed = sums
    if not pixels:
        return {"dice": None, "iou": None}
    union = right + added + missed
    return {
        "dice": 2 * right / (union + right) if union else 1.0,
        "iou": right / union if union else 1.0,
    }


def class_sums(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """float64 (3 * classes,) of one image: of each class the pixels right, true and predicted.

    predicted, truth: integers (H, W); a truth of -1 counts nowhere
    """
    counts = truth >= 0
    predicted, truth = predicted[counts], truth[counts].long()
    parts = (truth[predicted == truth], truth, predicted)
    return torch.cat([part.bincount(minlength=classes) for part in parts]).double()


def class_scores(sums: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """Mean IoU over the classes there are, pixel accuracy, and the IoU of each class by name."""
    n = len(names)
    right, pixels, predicted = sums[:n], sums[n : 2 * n], sums[2 * n :]
    iou = [counts.iou for counts in class_counts(right, pixels, predicted)]
    there = [value for value in iou if value is not None]
    total = sum(pixels)
    return {
        "miou": sum(there) / len(there) if there else None,
        "accuracy": sum(right) / total if total else None,
        "classes": dict(zip(names, iou, strict=True)),
    }


def value_scores(sums: Sequence[float], names: Sequence[str]) -> dict[str, float | None]:
    """The means of what ``ValueScores.sums`` gives, under these names."""
    pairs = zip(sums[::2], sums[1::2], strict=True)
    means = [total / count if count else None for total, count in pairs]
    return dict(zip(names, means, strict=False))
