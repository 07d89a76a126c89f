# SPDX-License-Identifier: Apache-2.0
"""What autocast computes in float32 on a GPU only, for a CPU that stands for one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_WIDE = {  # those that encoders and mask decoders call
    F.layer_norm,
    F.softmax,
    torch.softmax,
    torch.pow,
    torch.sum,
    torch.norm,
    Tensor.softmax,
    Tensor.pow,
    Tensor.__pow__,
    Tensor.sum,
    Tensor.norm,
}
_CHECKPOINTED = (  # of a mask decoder, of SAM and of SAM 3
    ("transformer", "output_upscaling"),
    ("transformer", "upscale_layer_norm"),
)


class GpuAutocast(TorchFunctionMode):
    """Lets these functions take float32 under a CPU's autocast, as they would on a GPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _WIDE and torch.is_autocast_enabled("cpu"):
            args = [_wide(argument) for argument in args]
        return func(*args, **(kwargs or {}))


def enter_in_decoders(model: nn.Module) -> None:
    """Let mask decoders enter a ``GpuAutocast`` of their own: a backward leaves the one around it,
    and a checkpoint in it would compute in other dtypes the second time."""
    modes: list[GpuAutocast] = []

    def enter(*_: object) -> None:
        modes.append(GpuAutocast())
        modes[-1].__enter__()

    def leave(*_: object) -> None:
        modes.pop().__exit__(None, None, None)

    for module in model.modules():
        for names in _CHECKPOINTED:
            for name in names if all(hasattr(module, name) for name in names) else ():
                getattr(module, name).register_forward_pre_hook(enter)
                getattr(module, name).register_forward_hook(leave, always_call=True)


def _wide(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16):
        return argument.float()
    return argument
