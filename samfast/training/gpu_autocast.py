# SPDX-License-Identifier: Apache-2.0
"""What autocast computes in float32 on a GPU only, for a CPU that stands for one."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WIDE = {
    F.layer_norm,
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    torch.pow,
    Tensor.pow,
    Tensor.__pow__,
    torch.sum,
    Tensor.sum,
    torch.norm,
    Tensor.norm,
}  # those that mask decoders call


class GpuAutocast(TorchFunctionMode):
    """Lets functions of these take float32 under a CPU's autocast, as they would on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _WIDE and torch.is_autocast_enabled("cpu"):
            args = [_wide(argument) for argument in args]
        return func(*args, **(kwargs or {}))


def _wide(argument):
    half = isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16)
    return argument.float() if half else argument
