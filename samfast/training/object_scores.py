# SPDX-License-Identifier: Apache-2.0
"""Scores of predicted objects against true ones.

An object is found where a predicted one has an IoU above 0.5 with it; no other one can. Over all
images together, with TP found, FP predicted otherwise and FN missed objects:

    AP50 = TP / (TP + FP + FN)            as Cellpose and StarDist score label images
    PQ = (sum of the found ones' IoU) / (TP + FP / 2 + FN / 2)      Kirillov et al. 2019

Predicted label images have no confidences, so that COCO's AP, which ranks by them, is not this.
"""

import numpy as np
import torch

from samfast.training.object_numbers import numbered

FOUND = 0.5  # IoU


def matched(predicted: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, float]:
    """(found, predicted otherwise, missed, sum of the found ones' IoU) of label images (H, W).

    Where the truth is negative, nothing counts.
    """
    counts = truth >= 0
    (predicted, p), (truth, t) = numbered(predicted[counts]), numbered(truth[counts])
    pairs, common = np.unique(
        truth.ravel().astype(np.int64) * (p + 1) + predicted.ravel(), return_counts=True
    )
    mine, theirs = pairs // (p + 1), pairs % (p + 1)
    sizes = np.bincount(predicted.ravel(), minlength=p + 1)
    true_sizes = np.bincount(truth.ravel(), minlength=t + 1)
    iou = common / (true_sizes[mine] + sizes[theirs] - common)
    found = iou[(mine > 0) & (theirs > 0) & (iou > FOUND)]
    return len(found), p - len(found), t - len(found), float(found.sum())


def object_scores(found: float, added: float, missed: float, iou: float) -> dict[str, float | None]:
    """AP50 and PQ from such counts; None where there is no object, in truth and prediction."""
    if not found + added + missed:
        return {"ap50": None, "pq": None}
    return {
        "ap50": found / (found + added + missed),
        "pq": iou / (found + (added + missed) / 2),
    }


class ObjectScores:
    """Counts over a validation set, in every process."""

    def __init__(self, device: torch.device | str = "cpu"):
        from torchmetrics import SumMetric

        self._sums = [SumMetric().set_dtype(torch.float64).to(device) for _ in range(4)]

    def update(self, counts: tuple[int, int, int, float]) -> None:
        """Add what ``matched`` gives of an image."""
        for metric, value in zip(self._sums, counts, strict=True):
            metric.update(torch.tensor(value, dtype=torch.float64, device=metric.device))

    def compute(self) -> dict[str, float]:
        """AP50 and PQ; 1 where there is no object, in truth and prediction."""
        found = object_scores(*(metric.compute().item() for metric in self._sums))
        return {name: 1.0 if value is None else value for name, value in found.items()}
