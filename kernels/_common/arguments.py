# SPDX-License-Identifier: Apache-2.0
"""Checks that public functions share; each raises ValueError with one sentence."""

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_devices(named: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all are on the first one's device."""
    first, x = next(iter(named.items()))
    for name, t in named.items():
        if t is not None and t.device != x.device:
            raise ValueError(
                f"{name} is on {t.device} but {first} is on {x.device}; move both to one device"
            )


def check_dtypes(named: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all have a floating-point dtype that samfast computes with."""
    for name, t in named.items():
        if t is not None and t.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {t.dtype}, but must be float16, bfloat16, float32 or float64"
            )


def check_tensors(named: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all are on the first one's device and of a known dtype."""
    check_devices(named)
    check_dtypes(named)


def check_dropout(dropout: float, seed: Tensor | None) -> None:
    """Raise ValueError unless dropout is below 1 and a given seed is one int64 element."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, but must be at least 0 and below 1")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(
            f"expected seed as one int64 element, got {seed.dtype} {tuple(seed.shape)}"
        )


def drawn_seed(seed: Tensor | None, dropout: float, x: Tensor) -> Tensor | None:
    """The seed of a dropout on x, drawn if none is given; None without dropout."""
    if dropout > 0.0 and seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    return seed if dropout > 0.0 else None
