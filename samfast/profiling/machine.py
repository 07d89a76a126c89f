# SPDX-License-Identifier: Apache-2.0
"""The machine a number belongs to: its name, and the rates that bound every operation."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

SIZES = {"cpu": (1024, 2**26), "cuda": (8192, 2**30)}  # side of a product, bytes of a copy
_SMALL_CALLS = 200


def name(device: str) -> str:
    """A GPU's product name, or the processor's and the number of torch's threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        rows = info.read_text(errors="replace").splitlines()
        names = [row for row in rows if row.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def now(device: str) -> float:
    """Seconds, once the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def best(device: str, call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of a call, the least of a few."""
    call()
    times = []
    for _ in range(repeats):
        start = now(device)
        call()
        times.append(now(device) - start)
    return min(times)


def rates(
    device: str, dtype: torch.dtype, sizes: tuple[int, int], repeats: int = 5
) -> tuple[float, float]:
    """FLOP/s of a large product of random matrices and bytes/s of a copy, best of a few."""
    n, size = sizes
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    flops = 2 * n**3 / best(device, lambda: torch.mm(a, b), repeats)
    return flops, 2 * size / best(device, lambda: target.copy_(source), repeats)


def launch_seconds(device: str) -> float:
    """What one call of a tiny operator takes, many in a row."""
    x = torch.zeros(16, device=device)

    def calls() -> None:
        for _ in range(_SMALL_CALLS):
            x.add_(1.0)

    return best(device, calls) / _SMALL_CALLS
