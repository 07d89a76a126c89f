# SPDX-License-Identifier: Apache-2.0
"""Dice and IoU of the foreground over a whole validation set."""

from collections.abc import Iterable

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
                f"prediction and truth have the shapes {tuple(predicted.shape)} and "
                f"{tuple(truth.shape)}"
            )
        predicted, truth = predicted.long().flatten(), truth.long().flatten()
        self._dice.update(predicted, truth)
        self._iou.update(predicted, truth)

    def compute(self) -> tuple[float, float]:
        """(Dice, IoU) over everything added so far, in every process."""
        return self._dice.compute().item(), self._iou.compute().item()


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
        if self.directions:
            valid = truth.isfinite().all(0) & (truth != 0).any(0)
            cosine = torch.cosine_similarity(predicted, truth, dim=0)[valid]
            errors = [torch.rad2deg(cosine.clamp(-1, 1).acos()), truth.new_empty(0)]
        else:
            valid = truth.isfinite()
            predicted, truth = predicted[valid], truth[valid]
            error = (predicted - truth).abs()
            errors = [error, (error / truth.abs())[truth != 0]]
        for i, error in enumerate(errors):
            self._sums[2 * i].update(error.double().sum())
            self._sums[2 * i + 1].update(float(error.numel()))

    def compute(self) -> tuple[float, ...]:
        """(absolute, relative) or (angle,) over everything added so far, in every process."""
        absolute, count, relative, others = (total.compute().item() for total in self._sums)
        if self.directions:
            return (absolute / max(1.0, count),)
        return absolute / max(1.0, count), relative / max(1.0, others)


def all_foreground_scores(truths: Iterable[Tensor]) -> tuple[float, float]:
    """(Dice, IoU) of calling every pixel foreground: what a useful model must beat."""
    scores = ForegroundScores()
    for truth in truths:
        scores.update(torch.ones_like(truth, dtype=torch.bool), truth)
    return scores.compute()
