# SPDX-License-Identifier: Apache-2.0
"""The machine of a measurement: its name, and the rates that bound every operation."""

import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes
# Rows, depth and columns of products: square ones, and layers of SAM's encoders.
PRODUCTS = {
    "cpu": (
        (1024, 1024, 1024),
        (2048, 768, 768),
        (2048, 768, 2304),
        (2048, 3072, 768),
        (4096, 1024, 1024),
        (2048, 2048, 2048),
    ),
    "cuda": ((8192, 8192, 8192), (8192, 1024, 4096), (16384, 4096, 1024)),
}
_ROUNDS = 6
_SECONDS = 6.0  # after which no further round begins
_MOST_SECONDS = 20.0  # after which nothing further is measured
_TURN = 0.03  # seconds of each product in a round, at least
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
    """FLOP/s of one large product of random matrices and bytes/s of a copy, best of a few.

    sizes: side of the square matrices, bytes of the copy
    """
    n, size = sizes
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    flops = 2 * n**3 / best(device, lambda: torch.mm(a, b), repeats)
    return flops, copies(device, size, repeats)


def copies(device: str, size: int, repeats: int = 10) -> float:
    """Bytes/s of a copy, read and written, best of a few."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / best(device, lambda: target.copy_(source), repeats)


def products(
    device: str, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int]]
) -> tuple[float, str]:
    """FLOP/s of the fastest product of all sizes and orders of factors, and which one that is.

    sizes: (rows, depth, columns)
    Each has a turn in every round, after a round that warms up. So what else the machine does for a
    moment slows a part of a round only. In a turn short products come often, for of many short
    ones one is soon undisturbed.
    """
    calls = [
        (2 * rows * depth * columns, f"{rows} × {depth} × {columns}{order}", call)
        for rows, depth, columns in sizes
        for order, call in _orders(device, dtype, rows, depth, columns)
    ]
    began, fastest = now(device), (0.0, "")
    for number in range(1 + _ROUNDS):  # the first warms up
        for flop, what, call in calls:
            start = now(device)
            if fastest[0] and start - began > _MOST_SECONDS:
                return fastest
            seconds = _turn(device, call, start)
            if number or start - began > _SECONDS:  # too slow to be measured twice
                fastest = max(fastest, (flop / seconds, what))
        if number and now(device) - began > _SECONDS:
            break
    return fastest


def _turn(device: str, call: Callable[[], object], start: float) -> float:
    """Seconds of the fastest call of a turn, in which short ones come often."""
    least, before = math.inf, start
    while before - start < _TURN:
        call()
        after = now(device)
        least, before = min(least, after - before), after
    return least


def _orders(
    device: str, dtype: torch.dtype, rows: int, depth: int, columns: int
) -> list[tuple[str, Callable[[], object]]]:
    """One product for each way in which its factors can lie, as in a layer's three products."""
    a, b = (
        torch.randn(size, device=device).to(dtype) for size in ((rows, depth), (depth, columns))
    )
    turned_a, turned_b = (t.T.contiguous().T for t in (a, b))
    return [
        ("", lambda: torch.mm(a, b)),
        (", second factor turned", lambda: torch.mm(a, turned_b)),
        (", first factor turned", lambda: torch.mm(turned_a, b)),
    ]


def launch_seconds(device: str) -> float:
    """What one call of a tiny operator takes, many in a row."""
    x = torch.zeros(16, device=device)

    def calls() -> None:
        for _ in range(_SMALL_CALLS):
            x.add_(1.0)

    return best(device, calls) / _SMALL_CALLS
