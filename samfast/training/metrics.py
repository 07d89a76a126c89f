# SPDX-License-Identifier: Apache-2.0
"""Scores and losses over a whole validation set, from sums over its images."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ForegroundScores:
    """Dice and IoU from pixel counts summed over all images (not a mean of per-image scores).

    Summing counts gives one well-defined number when some images have no foreground, weighs every
    pixel alike, and is the same however the images are batched or spread over processes. With no
    foreground in truth and prediction both scores are 1.

        Dice = 2·TP / (2·TP + FP + FN)        IoU = TP / (TP + FP + FN)
    """

    def __init__(self, device: torch.device | str = "cpu"):
        from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex

        # The F1 score of the foreground class is its Dice coefficient.
        self._dice = BinaryF1Score(validate_args=False, zero_division=1.0).to(device)
        self._iou = BinaryJaccardIndex(validate_args=False, zero_division=1.0).to(device)

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Add one image or a batch; both bool of equal shape."""
        if predicted.shape != truth.shape:
            raise ValueError(
                f"prediction and truth differ in shape: {tuple(predicted.shape)} and "
                f"{tuple(truth.shape)}"
            )
        if not predicted.numel():  # which torchmetrics does not take
            return
        predicted, truth = predicted.long().flatten(), truth.long().flatten()
        self._dice.update(predicted, truth)
        self._iou.update(predicted, truth)

    def compute(self) -> tuple[float, float]:
        """(Dice, IoU) over everything added so far, in every process."""
        return self._dice.compute().item(), self._iou.compute().item()


class ClassCounts(NamedTuple):
    """What was counted for one class.

    iou: None where the class is in neither truth nor prediction
    pixels, predicted: of the class in the truth and in the prediction, where the truth counts
    """

    iou: float | None
    pixels: int
    predicted: int


class ClassScores:
    """Mean IoU and pixel accuracy of classes, from counts summed over all images.

    The mean is over the classes that truth or prediction has somewhere; 0 where nothing counts.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu"):
        from torchmetrics.classification import MulticlassConfusionMatrix

        self._matrix = MulticlassConfusionMatrix(classes, validate_args=False).to(device)

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Add one image; int64 (H, W) both, truth -1 counts nowhere."""
        counts = truth >= 0
        self._matrix.update(predicted[counts], truth[counts])

    def compute(self) -> tuple[float, float]:
        """(mean IoU, pixel accuracy) over everything added so far, in every process."""
        matrix = self._matrix.compute().double()
        right = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - right
        iou = right[union > 0] / union[union > 0]
        total = matrix.sum().clamp(min=1)
        return iou.sum().item() / max(1, len(iou)), (right.sum() / total).item()

    def classes(self) -> list[ClassCounts]:
        """What was counted for each class, in every process."""
        matrix = self._matrix.compute()
        counts = (matrix.diagonal(), matrix.sum(1), matrix.sum(0))
        return class_counts(*(count.tolist() for count in counts))


def class_counts(
    right: Sequence[float], pixels: Sequence[float], predicted: Sequence[float]
) -> list[ClassCounts]:
    """Counts of each class from its pixels that are right, in the truth and in the prediction."""
    found = []
    for r, t, p in zip(right, pixels, predicted, strict=True):
        union = t + p - r
        found.append(ClassCounts(r / union if union else None, int(t), int(p)))
    return found


class ValueScores:
    """Mean absolute and mean relative error of values; of directions the mean angle in degrees.

    relative: |prediction - truth| / |truth|, where the truth is not 0
    """

    def __init__(self, directions: bool = False, device: torch.device | str = "cpu"):
        from torchmetrics import SumMetric

        self.directions = directions
        self._sums = [SumMetric().set_dtype(torch.float64).to(device) for _ in range(4)]

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Add one image; (C, H, W) both, a NaN in the truth counts nowhere."""
        for total, value in zip(self._sums, self.sums(predicted, truth), strict=True):
            total.update(value)

    def sums(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """float64 (4,) of one image: error, pixels, relative error, pixels that have one."""
        if self.directions:
            valid = truth.isfinite().all(0) & (truth != 0).any(0)
            cosine = torch.cosine_similarity(predicted, truth, dim=0)[valid]
            errors = [torch.rad2deg(cosine.clamp(-1, 1).acos()), truth.new_empty(0)]
        else:
            valid = truth.isfinite()
            predicted, truth = predicted[valid], truth[valid]
            error = (predicted - truth).abs()
            errors = [error, (error / truth.abs())[truth != 0]]
        parts = [(e.double().sum(), e.new_tensor(e.numel(), dtype=torch.float64)) for e in errors]
        return torch.stack([value for part in parts for value in part])

    def compute(self) -> tuple[float, ...]:
        """(absolute, relative) or (angle,) over everything added so far, in every process."""
        absolute, count, relative, others = (total.compute().item() for total in self._sums)
        if self.directions:
            return (absolute / max(1.0, count),)
        return absolute / max(1.0, count), relative / max(1.0, others)


class MeanLoss:
    """The mean of a loss over images, the same however they are batched or spread."""

    def __init__(self, device: torch.device | str = "cpu"):
        from torchmetrics import SumMetric

        self._losses: list[Tensor] = []  # left on the device until someone asks
        self._sums = [SumMetric().set_dtype(torch.float64).to(device) for _ in range(3)]

    def update(self, loss: Tensor) -> None:
        """Add the loss of one image."""
        self._losses.append(loss.detach().double())

    def compute(self) -> float:
        """The mean in every process; 0 of no image, NaN where a loss is not finite."""
        if self._losses:
            losses = torch.stack(self._losses)
            finite = losses.isfinite()  # torchmetrics would leave out a NaN
            values = (losses[finite].sum(), finite.double().sum(), (~finite).double().sum())
            for total, value in zip(self._sums, values, strict=True):
                total.update(value)
            self._losses = []
        total, images, not_finite = (own.compute().item() for own in self._sums)
        return math.nan if not_finite else total / max(1.0, images)


def all_foreground_scores(truths: Iterable[Tensor]) -> tuple[float, float]:
    """(Dice, IoU) of calling every pixel foreground: what a useful model must beat."""
    scores = ForegroundScores()
    for truth in truths:
        scores.update(torch.ones_like(truth, dtype=torch.bool), truth)
    return scores.compute()
