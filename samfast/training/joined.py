# SPDX-License-Identifier: Apache-2.0
"""One batch spread over several processes, so that they train as one process would."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Sampler

from samfast.training.data import EpochSampler
from samfast.training.launched import Launched

if TYPE_CHECKING:
    from accelerate.data_loader import DataLoaderShard

Counts = Callable[[Sequence[int]], Sequence[int]]


class JoinedBatches(Sampler):
    """This process's part of each joined batch of ``batch_size * processes`` images.

    A part is a run of the joined batch; parts differ by at most one image. A process whose part is
    empty takes the joined batch's first image, whose weight is 0: all must run as often.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, place: Launched):
        self.sampler = sampler
        self.batch_size = batch_size
        self.place = place
        self.done = 0

    def skip(self, batches: int) -> None:
        """Leave out that many batches at the beginning of the epoch, which are done."""
        self.done = batches

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.sampler) // (self.batch_size * self.place.processes))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for joined in self._joined():
            yield self._part(joined) or joined[:1]

    def counts(self) -> Iterator[int]:
        """The images of each joined batch."""
        return map(len, self._joined())

    def images(self, batch: int) -> list[int]:
        """Which images are in a joined batch of the whole epoch."""
        size = self.batch_size * self.place.processes
        return [index for index, _ in list(self.sampler)[batch * size : (batch + 1) * size]]

    def weights(self, counts: Counts, accumulate: int = 1) -> Iterator[list[float] | None]:
        """By what to multiply the means over a part, so that the mean over processes is right.

        The first is for a mean over all images, the others are for those that ``counts`` counts;
        each is the processes times the part's share. None for one process alone.
        counts: of images by their indices, over how many each of the goal's means is
        accumulate: the batches of an optimizer step, over all of which the counted means are taken;
            1: over each batch
        """
        processes = self.place.processes
        batches = list(self._joined())
        for number, joined in enumerate(batches):
            if processes == 1 and accumulate == 1:
                yield None
                continue
            begin = number - number % accumulate  # what is done are whole steps
            step = [key for batch in batches[begin : begin + accumulate] for key in batch]
            part, whole, all_ = (
                [index for index, _ in keys] for keys in (self._part(joined), joined, step)
            )
            of_images = processes * len(part) / max(1, len(whole))
            pairs = zip(counts(part), counts(all_), strict=True)
            yield [of_images, *(processes * accumulate * n / max(1, m) for n, m in pairs)]

    def _joined(self) -> Iterator[list[tuple[int, int]]]:
        keys, size = list(self.sampler), self.batch_size * self.place.processes
        for start in range(self.done * size, len(keys), size):
            yield keys[start : start + size]

    def _part(self, joined: list) -> list:
        rank, processes = self.place
        first, last = (-(-len(joined) * r // processes) for r in (rank, rank + 1))
        return joined[first:last]


def own_loader(loader: DataLoader, device: torch.device) -> "DataLoaderShard":
    """accelerate's loader of batches that are this process's already."""
    from accelerate.data_loader import prepare_data_loader

    return prepare_data_loader(loader, device, num_processes=1, process_index=0, put_on_device=True)
