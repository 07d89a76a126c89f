# SPDX-License-Identifier: Apache-2.0
"""Clicks that correct a mask: label 1 on missed pixels, label 0 on false ones.

A click is x, y, label, in pixels. If nothing is wrong, its label is -1 (not a point).
"""

import numpy as np
import torch
from torch import Tensor

from samfast.training.points import clicked_point

_NO_CLICK = (0.0, 0.0, -1.0)


def random_clicks(predicted: Tensor, truth: Tensor, valid: Tensor, draws: Tensor) -> Tensor:
    """float32 (M, 3), a random wrong pixel of each object, with equal probability.

    predicted, truth, valid: bool (M, S, S)   draws: float64 (M,), which one, from 0 to below 1
    The wrong pixels are counted line by line, so equal draws give equal clicks.
    Does not wait for the device.
    """
    wrong = (predicted != truth) & valid
    rows = wrong.sum(2).cumsum(1)  # (M, S), the wrong pixels up to the end of each line
    total = rows[:, -1]
    number = (draws * total).long().clamp(max=total - 1)[:, None]
    each = torch.arange(len(wrong), device=wrong.device)
    y = (rows <= number).sum(1).clamp(max=wrong.shape[1] - 1)
    before = torch.where(y > 0, rows[each, (y - 1).clamp(min=0)], 0)
    columns = wrong[each, y].cumsum(1)
    x = (columns <= number - before[:, None]).sum(1).clamp(max=wrong.shape[2] - 1)
    label = torch.where(total > 0, truth[each, y, x].long(), -1)
    return torch.stack([x, y, label], dim=1).float()


def deepest_click(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """float64 (3,), the innermost point of the missed or the false pixels, whichever are more.

    predicted, truth: bool (H, W)
    """
    missed, added = truth & ~predicted, predicted & ~truth
    is_missed = missed.sum() >= added.sum()
    x, y, label = point_in(missed if is_missed else added)
    return np.array([x, y, float(is_missed)] if label else _NO_CLICK)


def point_in(mask: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """``clicked_point`` of a mask with True pixels, looked for within their box.

    Without any, label 0.
    """
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(rows):
        return clicked_point(mask)
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return clicked_point(inside, rng) + np.array([columns[0], rows[0], 0.0])
