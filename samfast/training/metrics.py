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


def all_foreground_scores(truths: Iterable[Tensor]) -> tuple[float, float]:
    """(Dice, IoU) of calling every pixel foreground: what a useful model must beat."""
    scores = ForegroundScores()
    for truth in truths:
        scores.update(torch.ones_like(truth, dtype=torch.bool), truth)
    return scores.compute()
