# SPDX-License-Identifier: Apache-2.0
"""Check settings before anything is read."""

from math import isfinite
from pathlib import Path
from typing import Any

from samfast.adapters.options import options_of
from samfast.files.model_card import check_license
from samfast.methods.registry import VARIANTS
from samfast.models.architectures import architecture
from samfast.training.card import card_bytes
from samfast.training.chosen_tasks import check_masks, has_tasks
from samfast.training.file_pairs import check_suffix
from samfast.training.foreground import chosen_foreground, chosen_ignore
from samfast.training.image_options import image_options
from samfast.training.sam3_layers import check_for_model
from samfast.training.schedules import check_schedule
from samfast.training.settings import (
    EvaluateSettings,
    FinetuneSettings,
    MethodSettings,
    PredictSettings,
)
from samfast.training.sides import model_side
from samfast.training.tiles import chosen_tiles

Settings = FinetuneSettings | PredictSettings | EvaluateSettings


def check_settings(settings: FinetuneSettings, needs_data: bool = True) -> None:
    """Raise ValueError for options that are wrong whatever the data and the model are."""
    _check_paths(settings)
    architecture(settings.model)
    _check_choices(settings)
    _check_method_options(settings)
    _check_encoder(settings)
    if settings.prompt not in ("box", "mixed") and settings.box_jitter is not None:
        raise ValueError(
            f"box_jitter is {settings.box_jitter}, but prompt {settings.prompt} has no box"
        )
    if settings.fit is not None:
        card_bytes(settings.fit)
    check_masks(settings)
    _check_tiles(settings)
    _check_tasks(settings)
    check_suffix(settings.mask_suffix)
    check_license(settings.license)
    check_for_model(settings)
    if settings.schedule is not None:
        check_schedule(settings.schedule)
    _check_states(settings)
    chosen_ignore(settings.ignore, chosen_foreground(settings.foreground, settings.threshold))
    image_options(settings.bands, settings.range)
    if settings.data is None and needs_data and not settings.dry_run:
        raise ValueError("no data folder is named; give it with --data")
    _check_limits(settings)
    _check_numbers(settings)


def _check_encoder(settings: FinetuneSettings) -> None:
    """Raise ValueError for what only the fused encoder has, if it is not fused."""
    if settings.memory is not None and not settings.fuse:
        raise ValueError(
            f"memory is {settings.memory}, which only the fused encoder has; leave out --no-fuse"
        )
    if settings.graph == "on" and not settings.fuse:
        raise ValueError("graph is on, which only the fused encoder has; leave out --no-fuse")


def _check_states(settings: FinetuneSettings) -> None:
    """Raise ValueError for options that contradict each other about saved states."""
    if settings.resume is not None and settings.overwrite:
        raise ValueError(
            "--resume continues the run that --overwrite would replace; leave out one of them"
        )
    if settings.resume is not None and not settings.keep:
        raise ValueError("keep is 0, but --resume needs saved states; give --keep 1 or more")
    if settings.save_every is not None and not settings.keep:
        raise ValueError(
            f"save_every is {settings.save_every}, but keep is 0, which saves no state; give "
            "--keep 1 or more"
        )


def _check_numbers(settings: FinetuneSettings) -> None:
    """Raise ValueError for numbers whose limits are not whole numbers, or depend on the model."""
    side = model_side(settings)
    if settings.box_jitter is not None and settings.box_jitter > side:
        raise ValueError(
            f"box_jitter is {settings.box_jitter}; it must be at most {side}, the image's side"
        )
    for name in ("lr", "relation_lr"):
        rate = getattr(settings, name)
        if rate is not None and not (rate > 0 and isfinite(rate)):
            raise ValueError(f"{name} is {rate}; it must be above 0")
    if not 0.0 < settings.val_fraction < 1.0:
        raise ValueError(f"val_fraction is {settings.val_fraction}; it must be between 0 and 1")


def check_prediction(settings: PredictSettings | EvaluateSettings) -> None:
    """``check_settings`` for prediction and scores."""
    check_options(settings)
    check_suffix(getattr(settings, "mask_suffix", None))
    image_options(getattr(settings, "bands", None), getattr(settings, "range", None))


def check_options(settings: Any) -> None:
    """Raise ValueError for a path, choice or number that is out of range for its option."""
    _check_paths(settings)
    _check_choices(settings)
    _check_limits(settings)


def _check_paths(settings: Settings) -> None:
    for option in options_of(settings):
        value = getattr(settings, option.name)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and "\0" in str(path):
                raise ValueError(
                    f"{option.name} is {str(path)!r}; a path cannot have a NUL character"
                )


def _check_choices(settings: Settings) -> None:
    for option in options_of(settings):
        value = getattr(settings, option.name)
        if not option.choices or value is None:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if one not in option.choices:
                known = ", ".join(option.choices)
                raise ValueError(f"unknown {option.name} {one!r}; known are {known}")


def _check_limits(settings: Settings) -> None:
    for option in options_of(settings):
        value = getattr(settings, option.name)
        if isinstance(value, int) and value > option.most:
            raise ValueError(f"{option.name} is {value}; it must be at most {option.most}")
        if option.least is None or value is None:
            continue
        if not (isfinite(value) and value >= option.least):
            raise ValueError(f"{option.name} is {value}; it must be at least {option.least}")


def _check_tiles(settings: FinetuneSettings) -> None:
    """Raise ValueError for impossible tiles and for options that do not fit with or without
    tiles."""
    tiles = chosen_tiles(settings.tile, settings.overlap)
    if tiles is None and not settings.empty_tiles:
        raise ValueError("empty_tiles is off, but there are no tiles; give --tile")
    if tiles is not None and settings.prompt != "none":
        raise ValueError(
            f"tile is {settings.tile}, but prompt is {settings.prompt}, and prompts need whole "
            "images; leave out one of them"
        )


def _check_tasks(settings: FinetuneSettings) -> None:
    """Raise ValueError for options that do not fit with or without several tasks."""
    if settings.tasks is None:
        if not has_tasks(settings) and VARIANTS[settings.method].needs_tasks:
            raise ValueError(
                f"method {settings.method} is for several tasks; name their file with --tasks"
            )
        return
    if settings.prompt != "none":
        raise ValueError(
            f"prompt is {settings.prompt}, but several tasks take no prompts; leave out --prompt"
        )
    if settings.mask_suffix is not None:
        raise ValueError(
            f"mask_suffix is {settings.mask_suffix}, but with several tasks each mask has its "
            "image's name; leave it out"
        )
    for name in ("loss", "foreground", "threshold", "ignore"):
        if getattr(settings, name) is not None:
            raise ValueError(
                f"{name} is an option for one mask; with several tasks, set it for each task in "
                f"{settings.tasks}"
            )


def _check_method_options(settings: FinetuneSettings) -> None:
    """Raise ValueError for an option of another method."""
    method = VARIANTS[settings.method]
    own = {"method", *(option.name for option in method.options())}
    for option in options_of(MethodSettings):
        name, value = option.name, getattr(settings, option.name)
        if name in own or value is None or value is False:
            continue
        given = f"{name} is {value}"
        if isinstance(value, tuple):
            given = f"{name} {'are' if name.endswith('s') else 'is'} {', '.join(value)}"
        lacks = method.lacks.get(name, method.lacks_all)
        raise ValueError(f"{given}, but method {settings.method} {lacks}")
