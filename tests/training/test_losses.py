# SPDX-License-Identifier: Apache-2.0
"""The losses against their formulas in float64, and what padding may not do."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budgets import all_within_budget, keep

from samfast.kernels._common.budget import Budget
from samfast.training.data import valid_region
from samfast.training.losses import (
    LOSSES,
    balanced_bce_loss,
    bce_dice_loss,
    chosen_loss,
    structure_loss,
)
from samfast.training.settings import LOSSES as NAMES

SIZES = torch.tensor([[16, 16], [16, 9], [1, 16]])
VALID = valid_region(SIZES, 16)


def inputs(scale=3.0):
    torch.manual_seed(0)
    return scale * torch.randn(3, 16, 16), torch.rand(3, 16, 16) > 0.6


def by_image(one_image, logits, masks, dtype):
    """A formula on each image cut out of its padding, and the mean over the images."""
    losses = []
    for one, mask, (height, width) in zip(logits, masks, SIZES.tolist(), strict=True):
        losses.append(one_image(one[:height, :width].to(dtype), mask[:height, :width].to(dtype)))
    return torch.stack(losses).mean()


def bce_dice(x, t, dice_weight=1.0):
    p = x.sigmoid()
    dice = (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    return F.binary_cross_entropy_with_logits(x, t) + dice_weight * (1 - dice)


def structure(x, t, weighted=False):
    """With the mean of each pixel's neighbourhood by counting, pixel by pixel."""
    height, width = t.shape
    w = torch.empty_like(t)
    for i in range(height):
        for j in range(width):
            near = t[max(0, i - 15) : i + 16, max(0, j - 15) : j + 16].sum() / 31**2
            w[i, j] = 1 + 5 * (near - t[i, j]).abs()
    p = x.sigmoid()
    bce = -(t * F.logsigmoid(x) + (1 - t) * F.logsigmoid(-x))
    bce = (w * bce).sum() / w.sum() if weighted else bce.mean()
    both = (w * p * t).sum()
    either = (w * (p + t)).sum() - both
    return bce + 1 - (both + 1) / (either + 1)


def balanced(x, t):
    positive, negative = t.sum(), (1 - t).sum()
    missed = -(t * F.logsigmoid(x)).sum() * negative
    invented = -((1 - t) * F.logsigmoid(-x)).sum() * positive
    return (missed + invented) / (positive + negative) ** 2


FORMULAS = {
    "bce-dice": (LOSSES["bce-dice"], bce_dice),
    "bce": (partial(bce_dice_loss, dice_weight=0.0), partial(bce_dice, dice_weight=0.0)),
    "more dice": (partial(bce_dice_loss, dice_weight=2.5), partial(bce_dice, dice_weight=2.5)),
    "structure": (LOSSES["structure"], structure),
    "structure-weighted": (LOSSES["structure-weighted"], partial(structure, weighted=True)),
    "balanced-bce": (LOSSES["balanced-bce"], balanced),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_are_those_of_the_formula(name):
    fast, formula = FORMULAS[name]
    logits, masks = inputs()

    def results(function, dtype):
        x = logits.to(dtype, copy=True).requires_grad_(True)
        loss = function(x)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    def literal(dtype):
        return results(lambda x: by_image(formula, x, masks, dtype), dtype)

    ours = results(lambda x: fast(x, masks, VALID), torch.float32)
    stock, exact = (partial(literal, dtype) for dtype in (torch.float32, torch.float64))
    all_within_budget(ours, stock, exact, torch.float32, ("loss", "gradient"))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_derivatives(name):
    logits, masks = inputs(scale=2.0)
    x = logits[:, :9, :7].double().requires_grad_(True)
    valid = VALID[:, :9, :7]
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, masks[:, :9, :7], valid), x)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_invisible(name):
    loss_of = LOSSES[name]
    logits, masks = inputs()
    clean = logits.clone().requires_grad_(True)
    loss = loss_of(clean, masks, VALID)
    loss.backward()
    assert not clean.grad[~VALID].any() and clean.grad[VALID].all()
    for rubbish in (float("nan"), float("inf"), 1e30):
        dirty = torch.where(VALID, logits, rubbish).requires_grad_(True)
        again = loss_of(dirty, torch.where(VALID, masks, ~masks), VALID)
        again.backward()
        assert torch.equal(again, loss) and torch.equal(dirty.grad, clean.grad)


def test_cross_entropy_and_soft_dice_by_hand():
    """Value and slope of each image: p − t over the pixels, and with dice = n / d, where
    n = 2·Σpt + 1 and d = Σp + Σt + 1, p·(1 − p)·(n − 2·t·d) / d². Dice of a thresholded mask, as
    SAM-COBOT's authors have it, has no slope."""
    logits, masks = inputs()

    def by_hand(dtype):
        x, t = logits.to(dtype), masks.to(dtype)
        p = 1 / (1 + torch.exp(-x))
        n = 2 * (p * t).sum((1, 2), keepdim=True) + 1
        d = (p + t).sum((1, 2), keepdim=True) + 1
        bce = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
        slope = (p - t) / t[0].numel() + p * (1 - p) * (n - 2 * t * d) / d**2
        return bce + (1 - n / d).mean(), slope / len(x)

    x = logits.clone().requires_grad_(True)
    loss = bce_dice_loss(x, masks)
    loss.backward()
    stock, exact = (partial(by_hand, dtype) for dtype in (torch.float32, torch.float64))
    all_within_budget([loss.detach(), x.grad], stock, exact, torch.float32, ("loss", "gradient"))


def test_the_command_line_knows_every_loss():
    assert tuple(LOSSES) == NAMES


def test_edges_weigh_up_to_six_times():
    """A lone pixel: its weight is 1 + 5·(1 − 1/961), its neighbours' 1 + 5/961."""
    masks = torch.zeros(1, 40, 40, dtype=torch.bool)
    masks[0, 20, 20] = True
    at, beside, far = 5 * (1 - 1 / 961) + 1, 1 + 5 / 961, 1.0
    total = at + beside * (31**2 - 1) + far * (40**2 - 31**2)
    places = {(20, 20): at, (5, 35): beside, (4, 20): far}

    def by_weights():
        """What weighting the cross-entropy too changes in the gradient."""
        weights = torch.tensor(list(places.values()), dtype=torch.float64)
        residuals = 0.5 - torch.stack([masks[0, i, j] for i, j in places]).double()
        return residuals * (weights / total - 1 / 1600)

    def change(function):
        x = torch.zeros(40, 40, dtype=torch.float64, requires_grad=True)
        both = (torch.autograd.grad(function(x, flag), x)[0] for flag in (True, False))
        found = next(both) - next(both)
        return torch.stack([found[i, j] for i, j in places])

    def literal():
        return change(lambda x, weighted: structure(x, masks[0].double(), weighted))

    budget = Budget(literal, by_weights, torch.float64)
    keep(
        budget, [change(lambda x, weighted: structure_loss(x[None], masks, weighted_bce=weighted))]
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["no foreground", "all foreground", "one image without"])
@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_images_of_one_class_are_finite(name, kind, scale):
    logits, masks = inputs(scale)
    if kind == "one image without":
        masks[1] = False
    else:
        masks[:] = kind == "all foreground"
    x = logits.requires_grad_(True)
    loss = LOSSES[name](x, masks, VALID)
    loss.backward()
    assert loss.isfinite() and loss >= 0 and x.grad.isfinite().all()
    if name != "balanced-bce":
        assert loss > 0 and x.grad[1].any()
    else:  # an image of one class has no balance, and teaches nothing
        assert bool(loss > 0) == bool(x.grad[0].any()) == (kind == "one image without")
        assert not x.grad[1].any()


def test_both_classes_weigh_the_same():
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 0, :2] = True
    x = torch.zeros(1, 8, 8, requires_grad=True)
    balanced_bce_loss(x, masks).backward()
    share = 2 / 64
    assert x.grad[masks].unique().item() == -0.5 * (1 - share) / 64
    assert x.grad[~masks].unique().item() == 0.5 * share / 64


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


def test_a_loss_has_a_name():
    assert all(chosen_loss(name) is loss for name, loss in LOSSES.items())
    with pytest.raises(ValueError, match="expected the name of a loss, got none; known are bce-"):
        chosen_loss(None)
