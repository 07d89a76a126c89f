# SPDX-License-Identifier: Apache-2.0
"""The training losses of binary segmentation, by the names that ``--loss`` takes.

All take logits (B, H, W), masks (B, H, W) of 0 and 1 and valid (B, H, W) bool (None: everywhere),
and return the mean over the images, as if each had been cut out of its padding. Logits outside
``valid`` get exactly zero gradient, even NaN. They compute in fp32 (fp64 for fp64 logits) and raise
ValueError if the shapes differ.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE_WINDOW = 31  # pixels; how far from an edge the structure loss looks
EDGE_WEIGHT = 5.0


def bce_dice_loss(
    logits: Tensor,
    masks: Tensor,
    valid: Tensor | None = None,
    *,
    dice_weight: float = 1.0,
    smooth: float = 1.0,
) -> Tensor:
    """Binary cross-entropy plus soft Dice, per image.

    With v = valid, t = masks, p = sigmoid(logits) and sums over one image's pixels:

        loss = mean_B[ Σ v·bce(logits, t) / Σ v
                       + dice_weight · (1 − (2·Σ v·p·t + smooth) / (Σ v·p + Σ v·t + smooth)) ]

    It is the loss for SAM-COBOT too, whose authors compute Dice of the thresholded masks: a number
    without a gradient, where soft Dice takes the probabilities and has one.
    """
    logits, target, valid = _prepared(logits, masks, valid)
    bce = _image_sum(_cross_entropy(logits, target) * valid) / _image_sum(valid).clamp(min=1)
    probability = logits.sigmoid() * valid
    overlap = _image_sum(probability * target)
    total = _image_sum(probability) + _image_sum(target)
    dice = 1.0 - (2.0 * overlap + smooth) / (total + smooth)
    return (bce + dice_weight * dice).mean()


def structure_loss(
    logits: Tensor, masks: Tensor, valid: Tensor | None = None, *, weighted_bce: bool = False
) -> Tensor:
    """Cross-entropy plus soft IoU in which pixels near an edge count more (F³Net, PraNet).

    With t = masks, p = sigmoid(logits), m = the mean of t over the 31 x 31 pixels around each
    (pixels beyond the image count as background) and w = 1 + 5·|m − t| (0 outside ``valid``):

        loss = mean_B[ bce + 1 − (Σ w·p·t + 1) / (Σ w·(p + t − p·t) + 1) ]
        bce  = Σ v·bce(logits, t) / Σ v, or Σ w·bce(logits, t) / Σ w with ``weighted_bce``

    The published code means the weighted cross-entropy but averages before it weighs, and the
    weights cancel; published numbers come from that, so it is the default here.
    """
    logits, target, valid = _prepared(logits, masks, valid)
    weight = (1.0 + EDGE_WEIGHT * (_neighbourhood_mean(target) - target).abs()) * valid
    share = weight if weighted_bce else valid
    bce = _image_sum(_cross_entropy(logits, target) * share) / _image_sum(share).clamp(min=1)
    probability = logits.sigmoid()
    overlap = _image_sum(weight * probability * target)
    union = _image_sum(weight * (probability + target)) - overlap
    return (bce + 1.0 - (overlap + 1.0) / (union + 1.0)).mean()


def balanced_bce_loss(logits: Tensor, masks: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy in which foreground and background each weigh the other's share.

    With t = masks and π = Σ v·t / Σ v, the share of an image's pixels that are foreground:

        loss = mean_B[ Σ v·((1 − π)·t + π·(1 − t))·bce(logits, t) / Σ v ]

    Both classes have the same total weight, π·(1 − π). In an image with only one class it is 0, and
    so are its loss and gradient: such an image teaches nothing. The other losses punish false
    foreground there.
    """
    logits, target, valid = _prepared(logits, masks, valid)
    count = _image_sum(valid).clamp(min=1)
    share = (_image_sum(target) / count)[:, None, None]  # of the foreground, (B, 1, 1)
    weight = ((1.0 - share) * target + share * (1.0 - target)) * valid
    return (_image_sum(weight * _cross_entropy(logits, target)) / count).mean()


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of classes. logits (B, C, H, W), labels int64 (B, H, W), -1 counts nowhere.

    Mean over the labelled pixels of each image, then over the images; 0 for an image without any.
    """
    _check_maps(logits, labels[:, None], "labels")
    valid = labels >= 0
    logits = torch.where(valid[:, None], _wide(logits), 0.0)
    classes = torch.arange(logits.shape[1], device=logits.device)
    own = labels[:, None] == classes[:, None, None]  # (B, C, H, W)
    # Not by gathering the labels' logits, whose backward would add by atomics on a GPU.
    loss = logits.logsumexp(1) - torch.where(own, logits, 0.0).sum(1)
    return _image_mean(torch.where(valid, loss, 0.0), valid)


def value_loss(values: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error. values and truth (B, C, H, W); a NaN in the truth counts nowhere."""
    _check_maps(values, truth, "truth", values.shape[1])
    valid = truth.isfinite()
    difference = torch.where(valid, _wide(values), 0.0) - torch.where(valid, truth, 0.0)
    return _image_mean(difference.abs(), valid)


def direction_loss(values: Tensor, truth: Tensor) -> Tensor:
    """1 - cosine of the angle. values and truth (B, 3, H, W), of any length; pixels with a NaN in
    the truth, or with no length there, count nowhere."""
    _check_maps(values, truth, "truth", values.shape[1])
    valid = (truth.isfinite().all(1) & (truth != 0).any(1))[:, None]
    values, truth = (torch.where(valid, _wide(t), 0.0) for t in (values, truth))
    cosine = F.cosine_similarity(values, truth, dim=1)
    return _image_mean(torch.where(valid[:, 0], 1.0 - cosine, 0.0), valid[:, 0])


def _check_maps(values: Tensor, truth: Tensor, name: str, channels: int = 1) -> None:
    if truth.shape != (len(values), channels, *values.shape[2:]):
        raise ValueError(
            f"logits and {name} have different shapes: {tuple(values.shape)}, {tuple(truth.shape)}"
        )


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _image_mean(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of each image's valid values, which alone are not 0, and of these the mean."""
    count = valid.flatten(1).sum(1).clamp(min=1)
    return (_image_sum(values) / count).mean()


Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
LOSSES: dict[str, Loss] = {
    "bce-dice": bce_dice_loss,
    "structure": structure_loss,
    "structure-weighted": partial(structure_loss, weighted_bce=True),
    "balanced-bce": balanced_bce_loss,
}


def chosen_loss(name: str | None) -> Loss:
    """The loss of this name, which training's recipe fills in where the settings leave it open."""
    if name is None:
        raise ValueError(f"expected the name of a loss, got none; known are {', '.join(LOSSES)}")
    return LOSSES[name]


def _prepared(logits: Tensor, masks: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, target and valid, all (B, H, W) of the logits' dtype widened, 0 in the padding."""
    if logits.shape != masks.shape or (valid is not None and valid.shape != logits.shape):
        shapes = [tuple(t.shape) for t in (logits, masks, valid) if t is not None]
        raise ValueError(f"logits, masks and valid have different shapes: {shapes}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, target = logits.to(dtype), masks.to(dtype)
    if valid is None:
        return logits, target, torch.ones_like(target)
    # Replacing beats multiplying by 0, which would keep NaN and inf from the padding.
    zero = logits.new_zeros(())
    return torch.where(valid, logits, zero), torch.where(valid, target, zero), valid.to(dtype)


def _image_sum(values: Tensor) -> Tensor:
    """(B, H, W) -> (B,)"""
    return values.flatten(1).sum(1)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def _neighbourhood_mean(target: Tensor) -> Tensor:
    """Mean over EDGE_WINDOW² pixels with zeros beyond the image, (B, H, W) -> (B, H, W).

    Rows, then columns: sums of 0 and 1 are exact, so the order changes no bit, and 62 terms per
    pixel are far fewer than 961.
    """
    side, half = EDGE_WINDOW, EDGE_WINDOW // 2
    rows = F.avg_pool2d(target, (side, 1), 1, (half, 0), divisor_override=1)
    return F.avg_pool2d(rows, (1, side), 1, (0, half), divisor_override=side * side)
