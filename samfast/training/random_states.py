# SPDX-License-Identifier: Apache-2.0
"""The random generators of Python, NumPy and torch, taken down and put back.

Images, their order and their flips need none of them: they are functions of the seed. Dropout,
the gates' noise and a user's own code do.
"""

import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

_CPU = "torch"


def random_states(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON values, uint8 tensors) that say where all generators of this process are."""
    version, words, gauss = random.getstate()
    kind, numbers, *rest = cast("tuple[Any, ...]", np.random.get_state())
    values = {
        "python": [version, list(words), gauss],
        "numpy": [kind, numbers.tolist(), *rest],
    }
    tensors = {_CPU: torch.get_rng_state()}
    if device.type == "cuda":
        tensors[device.type] = torch.cuda.get_rng_state(device)
    return values, tensors


def restore_random_states(
    values: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> None:
    """Put the generators where ``random_states`` found them.

    On another kind of device its own generator stays where it is.
    """
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    kind, numbers, *rest = values["numpy"]
    np.random.set_state((kind, np.array(numbers, np.uint32), *rest))
    torch.set_rng_state(tensors[_CPU])
    if device.type == "cuda" and device.type in tensors:
        torch.cuda.set_rng_state(tensors[device.type], device)
