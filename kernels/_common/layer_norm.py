# SPDX-License-Identifier: Apache-2.0
"""What the torch paths of several operations need for a LayerNorm."""

import torch
from torch import Tensor


def alike(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three of one dtype: their own, or the widest, at least float32."""
    if x.dtype == weight.dtype == bias.dtype:
        return x, weight, bias
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), bias.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)
