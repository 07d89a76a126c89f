# SPDX-License-Identifier: Apache-2.0
"""Probabilities of what is predicted: the sigmoid or softmax of the logits at an image's size.

Nothing calibrates them. They agree with masks and classes in every pixel, rounding included.
"""

import numpy as np
import torch
from torch import Tensor

from samfast.training.tasks import TaskSpec

_HALF = np.float32(0.5)
_ABOVE = float(np.nextafter(_HALF, np.float32(1)))
_BELOW = float(np.nextafter(_HALF, np.float32(0)))
_KEY = "probability of "  # before a task's name, which holds no space


def key_of(task: str) -> str:
    """What a task's probabilities are called among the maps of an image."""
    return _KEY + task


def has_probability(spec: TaskSpec | None) -> bool:
    """Whether a task, or the one mask (None), has logits of what it predicts."""
    return spec is None or spec.kind in ("binary", "semantic")


def probabilities(maps: Tensor) -> Tensor:
    """float32 (1, H, W) of the foreground, from logits (1, H, W); of classes (C, H, W).

    Above and not below 0.5 where the logit is above 0, which rounding alone does not keep; and the
    largest of a pixel's classes is the one with the largest logit, the first of several.
    """
    maps = maps.float()
    if len(maps) == 1:
        found = maps.sigmoid()
        return torch.where(maps > 0, found.clamp(min=_ABOVE), found.clamp(max=_BELOW))
    found = maps.softmax(0)
    chosen = maps.argmax(0, keepdim=True)
    others = found.scatter(0, chosen, -1.0).amax(0, keepdim=True)
    above = torch.nextafter(others, torch.ones_like(others))
    return found.scatter(0, chosen, torch.maximum(found.gather(0, chosen), above))
