# SPDX-License-Identifier: Apache-2.0
"""What the ``launches.py`` of operations share: tensors without data, and TF32."""

from collections.abc import Callable

import torch
from torch import Tensor


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of this shape without data."""
    return torch.empty(shape, device="meta", dtype=dtype)


def in_tf32(call: Callable[[], None]) -> Callable[[], None]:
    """The call as where the user lets float32 products run in TF32."""

    def run():
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            call()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    return run
