# SPDX-License-Identifier: Apache-2.0
"""What an adapter of ``finetune`` remembers of its training, which prediction and scores need."""

from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from samfast.files.format import AdapterFile
from samfast.training.foreground import ANY, Foreground, chosen_foreground, chosen_ignore
from samfast.training.image_options import ImageOptions, remembered_options
from samfast.training.losses import LOSSES
from samfast.training.settings import PROMPTS
from samfast.training.tasks import TaskSpec, chosen_specs
from samfast.training.tiles import chosen_tiles


@dataclass(frozen=True)
class Remembered:
    """prompt: "none", "box", "point" or "mixed"   options: how images are read

    foreground, threshold, ignore: as the command line gives them
    specs: the tasks, () for one mask   loss: of one mask; None where the adapter does not know
    by_object: whether each object has a prompt of its own   rounds: predictions for each of these
    tiles: (tile, overlap) in pixels, into which images were cut; None for whole images
    """

    prompt: str
    options: ImageOptions
    foreground: tuple[int | Literal["any"], ...] | None
    threshold: float | None
    specs: tuple[TaskSpec, ...]
    loss: str | None = None
    ignore: tuple[float, ...] | None = None
    by_object: bool = False
    rounds: int = 1
    tiles: tuple[int, int] | None = None


def remembered(
    adapter: AdapterFile, task: str | None, bands: str | None = None, range: str | None = None
) -> Remembered:
    """What the adapter's record says, checked; bands and range take the place of its own.

    task: only this one of several. Raises ValueError with the adapter's name.
    """
    extra = adapter.record["extra"]
    specs = chosen_specs(adapter.folder, adapter.record, task)
    prompt = prompt_of(adapter)
    remembered_options({}, bands, range)  # the command line's own mistakes are not the adapter's
    try:
        foreground, threshold = _foreground(extra.get("foreground"), extra.get("threshold"))
        ignore = _ignore(extra.get("ignore"), chosen_foreground(foreground, threshold))
        options = remembered_options(extra, bands, range)
        tiles = _tiles(extra.get("tile"), extra.get("overlap"))
    except ValueError as error:
        raise ValueError(f"adapter {adapter.folder} cannot be used: {error}") from None
    loss = extra.get("loss")  # which other programs may use for a number
    loss = loss if isinstance(loss, str) and loss in LOSSES else None
    by_object = not specs and prompt != "none" and extra.get("masks") == "instances"
    if prompt == "mixed" and not by_object:
        raise ValueError(
            f"adapter {adapter.folder} was trained with prompt mixed, but not on prompted objects"
        )
    rounds = extra.get("prompt_rounds", 1) if by_object else 1
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(
            f"adapter {adapter.folder} was trained with {rounds!r} rounds of prompts; expected a "
            "whole number of at least 1"
        )
    return Remembered(
        prompt, options, foreground, threshold, specs, loss, ignore, by_object, rounds, tiles
    )


def prompt_of(adapter: AdapterFile) -> str:
    """What an adapter was trained to be prompted by, one of PROMPTS."""
    prompt = adapter.record["extra"].get("prompt", "none")
    if prompt not in PROMPTS:
        known = ", ".join(PROMPTS)
        raise ValueError(
            f"adapter {adapter.folder} was trained with prompt {prompt!r}; known are {known}"
        )
    return prompt


def _foreground(
    foreground: Any, threshold: Any
) -> tuple[tuple[int | Literal["any"], ...] | None, float | None]:
    if foreground is not None:
        values = foreground if isinstance(foreground, list) else [None]
        if values != [ANY] and not all(isinstance(v, int) for v in values):
            raise ValueError(f"its foreground is {foreground!r}; expected a list of mask values")
    if threshold is not None:
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not isfinite(threshold):
            raise ValueError(f"its threshold is {threshold!r}; expected a finite number")
    given = None if foreground is None else tuple(foreground)
    chosen_foreground(given, threshold)
    return given, threshold


def _tiles(tile: Any, overlap: Any) -> tuple[int, int] | None:
    for name, value in (("tile", tile), ("overlap", overlap)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if value is not None and not whole:
            raise ValueError(f"its {name} is {value!r}; expected a whole number of pixels")
    return chosen_tiles(tile, overlap)


def _ignore(given: Any, rule: Foreground) -> tuple[float, ...] | None:
    if given is None:
        return None
    values: list[Any] = given if isinstance(given, list) else [None]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ValueError(f"its ignore is {given!r}; expected a list of mask values")
    return chosen_ignore(values, rule)
