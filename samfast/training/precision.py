# SPDX-License-Identifier: Apache-2.0
"""What the names of number types mean on a device: of products, and of the frozen encoder."""

import torch

from samfast.training.settings import PRECISIONS

_PRECISION_OF = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What ``auto``, ``bf16``, ``fp16`` or ``fp32`` means on this device."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
    gpu = device.type == "cuda"
    if precision == "auto" and gpu:
        return torch.bfloat16 if _has_bfloat16() else torch.float16
    if precision == "fp16" and not gpu:
        raise ValueError(f"precision fp16 needs a CUDA device, but this one is {device.type}")
    names = {name: dtype for dtype, name in _PRECISION_OF.items()}
    return names.get(precision, torch.float32)


def _has_bfloat16() -> bool:
    """Whether the GPU has it, not an emulation; a card that is not here is taken to have it."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def base_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """What the frozen encoder is cast to; None leaves it float32, as it was read.

    name: one of BASE_DTYPES   dtype: what products are computed in   device: that computes them
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else None
    base, precision = getattr(torch, name), _PRECISION_OF[dtype]
    if base == torch.bfloat16 and dtype == torch.float16:
        raise ValueError("base dtype bfloat16 cannot be used with precision fp16; use bf16 or fp32")
    if base == torch.float16 and dtype != torch.float16:
        raise ValueError(
            f"base dtype float16 needs precision fp16, which scales the loss, got {precision}"
        )
    return None if base == torch.float32 else base
