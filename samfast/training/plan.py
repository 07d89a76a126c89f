# SPDX-License-Identifier: Apache-2.0
"""The fastest settings that fit a GPU, found by counting steps on tensors without memory.

Of the memory modes the first that fits is taken, since what is not computed again is faster. In
that mode, of all sizes of the decoder's chunks, each with the largest batch that fits, the one
whose optimizer step takes least:

    FLOP / rate + launches · 5 µs, of all batches of the step

with a rate of 50 TFLOP/s on a GPU and 0.1 on a CPU. These are round numbers that only put plans in
order. What the settings name stays: a memory mode, a chunk, --no-fuse, and the images of an
optimizer step, which are --batch-size times --accumulate.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from samfast.training.card import CONTEXT, WASTE, card_bytes, decimal, needed, room
from samfast.training.chosen_tasks import has_prompted_objects, specs_of
from samfast.training.settings import MEMORY, FinetuneSettings
from samfast.training.step_counts import Worst, counted_step

_CHUNKS = (None, 4, 1)
_RATE = {"cuda": 5e13, "cpu": 1e11}  # FLOP a second
_LAUNCH = 5e-6  # seconds


@dataclass(frozen=True)
class Plan:
    """What fits. card: bytes of the GPU's memory   peak: of tensors   settings: with the plan"""

    settings: FinetuneSettings
    card: int
    peak: int

    def options(self) -> str:
        """The plan as options of the command line."""
        settings = self.settings
        words: list[object] = [] if settings.memory is None else ["--memory", settings.memory]
        words += ["--batch-size", settings.batch_size, "--accumulate", settings.accumulate]
        if settings.decoder_chunk is not None:
            words += ["--decoder-chunk", settings.decoder_chunk]
        return " ".join(map(str, words))

    def sentence(self) -> str:
        return (
            f"plan for {decimal(self.card)}: {self.options()}; tensors take {decimal(self.peak)} "
            f"of {decimal(room(self.card))}, the rest is reserved: {decimal(CONTEXT)} for CUDA "
            f"and {WASTE:.0%} for allocator overhead"
        )

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "card_bytes": self.card,
            "room_bytes": room(self.card),
            "tensor_bytes": self.peak,
            "options": self.options(),
            "sentence": self.sentence(),
        }


def planned(
    settings: FinetuneSettings, device: torch.device, card: int | None = None
) -> tuple[FinetuneSettings, Plan | None]:
    """The settings with what ``fit`` and ``memory`` auto mean on the device, and the plan if any.

    settings: with their recipe   card: bytes of the GPU at hand, if not this process's alone
    Raises ValueError where nothing fits, with what the least would need.
    """
    if settings.fit is None and settings.memory != "auto":
        return settings, None
    here = memory_of(device) if card is None else card
    if settings.fit is None and here is None:
        return dataclasses.replace(settings, memory=MEMORY[0]), None
    size = _card(settings, here)
    plan = _search(settings, device, size)
    return plan.settings, plan


def memory_of(device: torch.device) -> int | None:
    """Bytes of the GPU, whatever else uses it, so that the plan is always the same; None: no GPU"""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def _card(settings: FinetuneSettings, here: int | None) -> int:
    """Bytes that ``fit`` names, or those of the GPU at hand."""
    named = None if settings.fit is None else card_bytes(settings.fit)
    if named is not None:
        if here is not None and named > here and not settings.dry_run:
            raise ValueError(
                f"fit is {settings.fit}, but this GPU has {decimal(here)}; use --fit auto"
            )
        return named
    if here is None:
        raise ValueError("fit is auto, but no GPU was found; give a memory size such as --fit 12GB")
    return here


def _search(settings: FinetuneSettings, device: torch.device, card: int) -> Plan:
    modes: Sequence[str | None] = MEMORY if settings.fuse else (None,)
    if settings.memory not in (None, "auto"):
        modes = (settings.memory,)
    images = settings.batch_size * settings.accumulate
    sizes = [n for n in range(1, images + 1) if images % n == 0]
    if settings.fit is None:  # only the mode is open
        sizes = [settings.batch_size]
    chunks = _chunks(settings, sizes[-1])
    least: Plan | None = None
    for mode in modes:
        found = []
        for chunk in chunks:
            own = dataclasses.replace(settings, memory=mode, decoder_chunk=chunk, fit=None)
            tried = _Tried(own, images, device, card)
            smallest = tried.plan(sizes[0])
            if least is None or smallest.peak < least.peak:
                least = smallest
            if tried.fits(sizes[0]):
                found.append(tried.seconds_and_plan(_largest(sizes, tried.fits)))
        if found:
            return min(found, key=lambda pair: pair[0])[1]
    assert least is not None, modes
    raise ValueError(_nothing_fits(settings, card, least))


def _chunks(settings: FinetuneSettings, batch: int) -> list[int | None]:
    """Sizes of the decoder's chunks to try, the fastest first."""
    if settings.decoder_chunk is not None or settings.fit is None:
        return [settings.decoder_chunk]
    objects = batch
    if has_prompted_objects(settings):
        assert settings.objects is not None  # the recipe fills it in
        objects *= settings.objects
    if (specs := specs_of(settings)) is not None:
        objects *= sum(spec.task.channels for spec in specs)
    return [chunk for chunk in _CHUNKS if chunk is None or chunk < objects]


def _largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of ascending sizes that fits, where the first does."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle - 1)
    return sizes[low]


class _Tried:
    """Counted steps of one mode and chunk by their batch size."""

    def __init__(self, settings: FinetuneSettings, images: int, device: torch.device, card: int):
        self.settings, self.images, self.device, self.card = settings, images, device, card
        self.counted: dict[int, Worst] = {}

    def worst(self, batch: int) -> Worst:
        if batch not in self.counted:
            self.counted[batch] = counted(self.at(batch), self.device)
        return self.counted[batch]

    def at(self, batch: int) -> FinetuneSettings:
        return dataclasses.replace(self.settings, batch_size=batch, accumulate=self.images // batch)

    def fits(self, batch: int) -> bool:
        return self.worst(batch).total <= room(self.card)

    def plan(self, batch: int) -> Plan:
        return Plan(self.at(batch), self.card, self.worst(batch).total)

    def seconds_and_plan(self, batch: int) -> tuple[float, Plan]:
        worst, plan = self.worst(batch), self.plan(batch)
        seconds = (
            worst.flops / _RATE.get(self.device.type, _RATE["cuda"]) + worst.launches * _LAUNCH
        )
        return seconds * plan.settings.accumulate, plan


def counted(settings: FinetuneSettings, device: torch.device) -> Worst:
    """The worst moment of a step of settings with their recipe."""
    with counted_step(settings, device) as step:
        return step.worst()


def _nothing_fits(settings: FinetuneSettings, card: int, least: Plan) -> str:
    named = [f"--memory {settings.memory}"] * (settings.memory not in (None, "auto"))
    named += [f"--decoder-chunk {settings.decoder_chunk}"] * (
        settings.fit is not None and settings.decoder_chunk is not None
    )
    named += ["--no-fuse"] * (not settings.fuse)
    ways = [f"leave out {' and '.join(named)}"] if named else []
    ways += ["add --fit auto"] if settings.fit is None else []
    ways += ["take a smaller --image-size", "a smaller --model"]
    least_size = decimal(_upwards(needed(least.peak)))
    return (
        f"nothing fits {decimal(card)}: {least.options()} needs {least_size} with the reserve; "
        f"{', '.join(ways[:-1])} or {ways[-1]}"
    )


def _upwards(size: int) -> int:
    """Bytes in whole hundredths of a GB, as ``--fit`` would have to name them."""
    return -(-size // 10**7) * 10**7
