# SPDX-License-Identifier: Apache-2.0
"""What an epoch shows while it runs: losses, the bar, memory."""

import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor


class Losses:
    """The losses of an epoch, left on the device until someone asks.

    Each BLOCK of them becomes one tensor, so that a long epoch holds few.
    """

    BLOCK = 64

    def __init__(self, step: int):
        self.first_step = step
        self.blocks: list[Tensor] = []
        self.values: list[Tensor] = []
        self.counts: list[int] = []

    @property
    def images(self) -> int:
        return sum(self.counts)

    def add(self, loss: Tensor, count: int) -> None:
        self.values.append(loss.detach().float())
        self.counts.append(count)
        if len(self.values) == self.BLOCK:
            self._pack()

    def join(self, reduce: Callable[..., Tensor]) -> None:
        """Put the mean over processes in the place of each loss; reduce: accelerate's."""
        self.blocks = [reduce(self._all(), reduction="mean")]

    def mean(self) -> float:
        """Mean over images so far; FloatingPointError when one of the losses is not finite."""
        values = self._all().tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} in batch {i + 1} after step {self.first_step}; the "
                    "results of earlier epochs are kept, a smaller --lr may help"
                )
        weighted = sum(value * n for value, n in zip(values, self.counts, strict=True))
        return weighted / self.images

    def _all(self) -> Tensor:
        """All losses so far, in one tensor."""
        self._pack()
        return torch.cat(self.blocks)

    def _pack(self) -> None:
        if self.values:
            self.blocks.append(torch.stack(self.values))
            self.values = []


class Progress:
    """The bar of one epoch (on a terminal only), and its clock."""

    _INTERVAL = 0.5  # seconds; showing the loss waits for the device

    def __init__(self, title: str, images: int, *, main: bool):
        self.title = title
        self.total = images
        self.hidden = None if main else True  # None: tqdm decides by the terminal

    def __enter__(self):
        from tqdm import tqdm

        self.bar = tqdm(
            desc=self.title, total=self.total, unit=" images", leave=False, disable=self.hidden
        )
        self.images = 0
        self.began = self.shown = time.perf_counter()
        return self

    def __exit__(self, *_):
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

    def images_per_second(self) -> float:
        return self.images / (time.perf_counter() - self.began)


def peak_memory_mib(device: torch.device) -> float:
    """Peak of the epoch's GPU allocations, or of the process's resident memory so far."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if sys.platform == "win32":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
