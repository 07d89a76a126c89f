# SPDX-License-Identifier: Apache-2.0
"""BCE + Dice against its formula in float64, and what padding may not do."""

import pytest
import torch
import torch.nn.functional as F
from budgets import within_budget

from samfast.training.data import valid_region
from samfast.training.losses import bce_dice_loss

SIZES = torch.tensor([[16, 16], [16, 9], [1, 16]])
VALID = valid_region(SIZES, 16)


def inputs(scale=3.0):
    torch.manual_seed(0)
    return scale * torch.randn(3, 16, 16), torch.rand(3, 16, 16) > 0.6


def by_image(logits, masks, dtype, dice_weight=1.0):
    """The formula on each image cut out of its padding, from torch's own functions."""
    losses = []
    for one, mask, (height, width) in zip(logits, masks, SIZES.tolist(), strict=True):
        x, t = one[:height, :width].to(dtype), mask[:height, :width].to(dtype)
        p = x.sigmoid()
        dice = (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        losses.append(F.binary_cross_entropy_with_logits(x, t) + dice_weight * (1 - dice))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dice_weight", [0.0, 1.0, 2.5])
def test_value_and_gradient_are_those_of_the_formula(dice_weight):
    logits, masks = inputs()
    results = []
    for form in ("ours", torch.float32, torch.float64):
        x = logits.to(torch.float32 if form == "ours" else form, copy=True).requires_grad_(True)
        if form == "ours":
            loss = bce_dice_loss(x, masks, VALID, dice_weight=dice_weight)
        else:
            loss = by_image(x, masks, form, dice_weight)
        loss.backward()
        results.append((loss.detach(), x.grad))
    for ours, stock, exact in zip(*results, strict=True):
        within_budget(ours, stock, exact, torch.float32)


def test_padding_is_invisible():
    logits, masks = inputs()
    clean = logits.clone().requires_grad_(True)
    loss = bce_dice_loss(clean, masks, VALID)
    loss.backward()
    assert not clean.grad[~VALID].any() and clean.grad[VALID].all()
    for rubbish in (float("nan"), float("inf"), 1e30):
        dirty = torch.where(VALID, logits, rubbish).requires_grad_(True)
        again = bce_dice_loss(dirty, torch.where(VALID, masks, ~masks), VALID)
        again.backward()
        assert torch.equal(again, loss) and torch.equal(dirty.grad, clean.grad)


def test_low_precision_logits_are_widened_first():
    logits, masks = inputs()
    low = logits.bfloat16()
    assert torch.equal(bce_dice_loss(low, masks), bce_dice_loss(low.float(), masks))
    assert bce_dice_loss(low, masks).dtype == torch.float32


def test_perfect_and_hopeless_predictions_and_empty_masks():
    _, masks = inputs()
    sure = torch.where(masks, 1000.0, -1000.0)
    assert bce_dice_loss(sure, masks).item() == 0.0
    assert bce_dice_loss(-sure, masks).item() > 100.0
    nothing = torch.zeros_like(masks)
    assert bce_dice_loss(torch.full((3, 16, 16), -1000.0), nothing).item() == 0.0


def test_shapes_must_agree():
    logits, masks = inputs()
    with pytest.raises(ValueError, match=r"different shapes: \[\(3, 16, 16\), \(2, 16, 16\)\]"):
        bce_dice_loss(logits, masks[:2])
    with pytest.raises(ValueError, match="different shapes"):
        bce_dice_loss(logits, masks, VALID[:, :1])
