# SPDX-License-Identifier: Apache-2.0
"""The machine a number belongs to: its name, and the two rates that bound every operation."""

import platform
import re
import time
from pathlib import Path

import torch

LAUNCH_SECONDS = {"cpu": 0.0, "cuda": 5e-6}


def name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [row for row in info.read_text().splitlines() if row.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def slug(device: str) -> str:
    """The name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name(device).lower()).strip("-")


def now(device: str) -> float:
    """Seconds, once the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large product of random matrices and bytes/s of a copy, best of a few."""
    n, size = (8192, 2**30) if device == "cuda" else (2048, 2**27)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    flops = 2 * n**3 / _best(device, lambda: torch.mm(a, b))
    return flops, 2 * size / _best(device, lambda: target.copy_(source))


def predict(stages, device: str, flop_rate: float, byte_rate: float) -> float:
    """Seconds: each stage takes its longer of arithmetic and traffic, plus its launches."""
    return sum(
        max(stage.flops / flop_rate, stage.bytes / byte_rate)
        + stage.launches * LAUNCH_SECONDS[device]
        for stage in stages
    )


def _best(device, call, repeats=5):
    call()
    times = []
    for _ in range(repeats):
        start = now(device)
        call()
        times.append(now(device) - start)
    return min(times)
