# SPDX-License-Identifier: Apache-2.0
"""What a run shows: the bar, memory, the time that is left."""

import math
import sys
import time

import torch


class Progress:
    """The bar of one pass over images (on a terminal only), and its clock."""

    _INTERVAL = 0.5  # seconds; showing the loss waits for the device

    def __init__(self, title: str, images: int, *, main: bool):
        self.title = title
        self.total = images
        self.hidden = None if main else True  # None: tqdm decides by the terminal

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        self.bar = tqdm(
            desc=self.title, total=self.total, unit=" images", leave=False, disable=self.hidden
        )
        self.images = 0
        self.began = self.shown = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, images: int) -> bool:
        """Count images; whether it is time to show the loss."""
        self.images += images
        self.bar.update(images)
        now = time.perf_counter()
        due = not self.bar.disable and now - self.shown >= self._INTERVAL
        self.shown = now if due else self.shown
        return due

    def show(self, loss: float) -> None:
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def seconds(self) -> float:
        return time.perf_counter() - self.began


def time_left(seconds: float, done: int, left: int) -> str:
    """How long the epochs that are left take, as "12 min left"; nothing when none is.

    seconds: that the epochs done took, all together
    """
    return f"{duration(seconds / done * left)} left" if left else ""


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3 h 20 min."""
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0)
    return " ".join(parts)


def peak_memory_mib(device: torch.device) -> float:
    """Peak of the epoch's GPU allocations, or of the process's resident memory so far."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if sys.platform == "win32":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
