# SPDX-License-Identifier: Apache-2.0
"""The machine of a measurement: its name, and the two rates that bound every operation."""

import re

import torch

from samfast.profiling import machine
from samfast.profiling.machine import name, now

__all__ = ["LAUNCH_SECONDS", "name", "now", "predict", "rates", "slug"]
LAUNCH_SECONDS = {"cpu": 0.0, "cuda": 5e-6}


def slug(device: str) -> str:
    """The name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name(device).lower()).strip("-")


def rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large product of random matrices and bytes/s of a copy, best of a few."""
    return machine.rates(device, dtype, (8192, 2**30) if device == "cuda" else (2048, 2**27))


def predict(stages, device: str, flop_rate: float, byte_rate: float) -> float:
    """Seconds: each stage takes its longer of arithmetic and traffic, plus its launches."""
    return sum(
        max(stage.flops / flop_rate, stage.bytes / byte_rate)
        + stage.launches * LAUNCH_SECONDS[device]
        for stage in stages
    )
