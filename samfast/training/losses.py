# SPDX-License-Identifier: Apache-2.0
"""The training loss of binary segmentation."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bce_dice_loss(
    logits: Tensor,
    masks: Tensor,
    valid: Tensor | None = None,
    *,
    dice_weight: float = 1.0,
    smooth: float = 1.0,
) -> Tensor:
    """Binary cross-entropy plus soft Dice, the mean over the images; computed in fp32.

    logits: (B, H, W)   masks: (B, H, W), 0 or 1   valid: (B, H, W) bool, None means everywhere
    With v = valid, t = masks, p = sigmoid(logits) and sums over one image's pixels:

        loss = mean_B[ Σ v·bce(logits, t) / Σ v
                       + dice_weight · (1 − (2·Σ v·p·t + smooth) / (Σ v·p + Σ v·t + smooth)) ]

    Logits outside ``valid`` get exactly zero gradient, whatever they hold. Raises ValueError
    when the shapes differ.
    """
    if logits.shape != masks.shape or (valid is not None and valid.shape != logits.shape):
        shapes = [tuple(t.shape) for t in (logits, masks, valid) if t is not None]
        raise ValueError(f"logits, masks and valid have different shapes: {shapes}")
    logits, target = logits.float(), masks.float()
    if valid is None:
        count = torch.full(logits.shape[:1], logits.shape[1:].numel(), device=logits.device)
    else:
        # Replacing beats multiplying by 0, which would keep NaN and inf from the padding.
        logits = torch.where(valid, logits, 0.0)
        target = torch.where(valid, target, 0.0)
        count = valid.flatten(1).sum(1)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    if valid is not None:
        bce, probability = bce * valid, probability * valid
    bce = bce.flatten(1).sum(1) / count.clamp(min=1)
    overlap = (probability * target).flatten(1).sum(1)
    total = probability.flatten(1).sum(1) + target.flatten(1).sum(1)
    dice = 1.0 - (2.0 * overlap + smooth) / (total + smooth)
    return (bce + dice_weight * dice).mean()
