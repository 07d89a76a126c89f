# SPDX-License-Identifier: Apache-2.0
"""All objects of an image by segment_anything's automatic mask generator, on an adapted model."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from samfast.training.adapter_settings import EvaluateSettings, PredictSettings
from samfast.training.object_numbers import kept_objects

GRID = ("points_per_side", "pred_iou_thresh", "stability_score_thresh")  # options of prediction


class Grid(TypedDict, total=False):
    """Grid options as ``automatic_objects`` takes them."""

    points_per_side: int
    pred_iou_thresh: float
    stability_score_thresh: float


def check_grid(settings: EvaluateSettings | PredictSettings) -> None:
    """Raise ValueError for grid options that are not numbers or lack --automatic."""
    for name in GRID:
        value = getattr(settings, name)
        if value is not None and not settings.automatic:
            raise ValueError(f"{name} is {value}, but there is no grid; give --automatic")
        if value is not None and not isfinite(value):
            raise ValueError(f"{name} is {value}; it must be a finite number")


def grid_of(settings: EvaluateSettings | PredictSettings) -> Grid:
    """Return the grid options that are given."""
    given: Grid = {}
    if settings.points_per_side is not None:
        given["points_per_side"] = settings.points_per_side
    if settings.pred_iou_thresh is not None:
        given["pred_iou_thresh"] = settings.pred_iou_thresh
    if settings.stability_score_thresh is not None:
        given["stability_score_thresh"] = settings.stability_score_thresh
    return given


def automatic_objects(
    sam: nn.Module,
    image: np.ndarray,
    *,
    points_per_side: int = 32,
    pred_iou_thresh: float = 0.88,
    stability_score_thresh: float = 0.95,
    points_per_batch: int = 64,
    min_size: int = 0,
) -> np.ndarray:
    """int32 (H, W): number objects from 1; where masks overlap, the smaller is on top.

    sam: segment_anything's Sam, with or without adapters   image: uint8 (H, W, 3)
    The thresholds and scores are those of ``SamAutomaticMaskGenerator``. Each point gives the mask
    of the decoder's first token, which is the only one that training changes.
    """
    from segment_anything import SamAutomaticMaskGenerator
    from segment_anything.utils.amg import rle_to_mask

    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=points_per_side,
        pred_iou_thresh=pred_iou_thresh,
        stability_score_thresh=stability_score_thresh,
        points_per_batch=points_per_batch,
        output_mode="uncompressed_rle",  # as masks, hundreds of them would fill the memory
    )
    of_three = generator.predictor.predict_torch

    def of_one(*arguments: Any, multimask_output: bool, **options: Any) -> Any:
        """Return only the mask of the token that fine-tuning trains, not the three others."""
        return of_three(*arguments, multimask_output=False, **options)

    generator.predictor.predict_torch = of_one
    with suppression_in_torch(), torch.no_grad():
        found = generator.generate(image)
    labels = np.zeros(image.shape[:2], np.int32)
    for number, mask in enumerate(sorted(found, key=lambda mask: -mask["area"]), start=1):
        labels[rle_to_mask(mask["segmentation"])] = number
    return kept_objects(labels, min_size)


@contextmanager
def suppression_in_torch() -> Iterator[None]:
    """Let the generator use ``batched_nms`` if torchvision has no operator for it."""
    import segment_anything.automatic_mask_generator as module

    given = module.batched_nms
    try:
        given(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1), 0.5)
    except (RuntimeError, NotImplementedError):
        module.batched_nms = batched_nms
    try:
        yield
    finally:
        module.batched_nms = given


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of boxes that no better box of their category covers, best first.

    boxes: (N, 4), x0, y0, x1, y1   scores, idxs: (N,)   as torchvision.ops.batched_nms
    A kept box covers those whose IoU with it is above the threshold.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, idxs = boxes[order].float(), idxs[order]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    covered = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    kept = []
    for i in range(len(boxes)):
        if covered[i]:
            continue
        kept.append(i)
        low, high = (
            torch.maximum(boxes[i, :2], boxes[:, :2]),
            torch.minimum(boxes[i, 2:], boxes[:, 2:]),
        )
        common = (high - low).clamp(min=0).prod(1)
        iou = common / (area[i] + area - common)
        covered |= (iou > iou_threshold) & (idxs == idxs[i])
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]
