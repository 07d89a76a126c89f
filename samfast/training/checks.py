# SPDX-License-Identifier: Apache-2.0
"""What no data or model can make right about settings: ValueErrors before anything is read."""

from math import isfinite

from samfast import backends
from samfast.models.architectures import architecture
from samfast.training.foreground import chosen_foreground
from samfast.training.image_options import image_options
from samfast.training.recipe import LACKS, OPTIONS, RELATED
from samfast.training.settings import (
    BASE_DTYPES,
    LOSSES,
    MEMORY,
    METHODS,
    PRECISIONS,
    PROMPTS,
    SCHEDULES,
    FinetuneSettings,
    PredictSettings,
)


def check_settings(settings: FinetuneSettings) -> None:
    """Raise ValueError for an option that no data or model can make right."""
    architecture(settings.model)
    _check_known(settings, method=METHODS, precision=PRECISIONS, backend=backends.NAMES)
    _check_known(settings, base_dtype=BASE_DTYPES, prompt=PROMPTS)
    for name, known in (("schedule", SCHEDULES), ("loss", LOSSES), ("memory", MEMORY)):
        if getattr(settings, name) is not None:
            _check_known(settings, **{name: known})
    _check_method_options(settings)
    if settings.memory is not None and not settings.fuse:
        raise ValueError(
            f"memory is {settings.memory}, which only the fused encoder has; leave out --no-fuse"
        )
    if settings.prompt != "box" and settings.box_jitter is not None:
        raise ValueError(
            f"box_jitter is {settings.box_jitter}, but prompt {settings.prompt} has no box"
        )
    _check_tasks(settings)
    chosen_foreground(settings.foreground, settings.threshold)
    image_options(settings.bands, settings.range)
    if settings.data is None and not settings.dry_run:
        raise ValueError("no data folder is named; give it with --data")
    _check_smallest(settings, 1, "epochs", "repeats", "batch_size", "accumulate", "threads")
    _check_smallest(settings, 1, "decoder_chunk", "kron_n")
    _check_smallest(settings, 0, "workers", "overlays", "weight_decay", "clip", "seed")
    _check_smallest(settings, 0, "box_jitter")
    side = settings.image_size or architecture(settings.model).image_size
    if settings.box_jitter is not None and settings.box_jitter > side:
        raise ValueError(
            f"box_jitter is {settings.box_jitter}; it must be at most {side}, the image's side"
        )
    for name in ("lr", "relation_lr"):
        rate = getattr(settings, name)
        if rate is not None and not (rate > 0 and isfinite(rate)):
            raise ValueError(f"{name} is {rate}; it must be above 0")
    if not 0.0 < settings.val_fraction < 1.0:
        raise ValueError(f"val_fraction is {settings.val_fraction}; it must lie between 0 and 1")


def check_prediction(settings: PredictSettings) -> None:
    """``check_settings`` for prediction."""
    _check_known(settings, precision=PRECISIONS, backend=backends.NAMES)
    _check_smallest(settings, 1, "batch_size", "decoder_chunk", "threads")
    image_options(getattr(settings, "bands", None), getattr(settings, "range", None))


def _check_known(settings: FinetuneSettings | PredictSettings, **known: tuple[str, ...]) -> None:
    for name, names in known.items():
        value = getattr(settings, name)
        if value not in names:
            raise ValueError(f"unknown {name} {value!r}; known are {', '.join(names)}")


def _check_smallest(settings: FinetuneSettings | PredictSettings, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (value >= least and isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def _check_tasks(settings: FinetuneSettings) -> None:
    """Raise ValueError for what goes with several tasks only, or not at all."""
    if settings.tasks is None:
        if settings.method == "ta-lora":
            raise ValueError("method ta-lora is for several tasks; name their file with --tasks")
        return
    if settings.prompt != "none":
        raise ValueError(f"prompt is {settings.prompt}, but several tasks have no prompts")
    for name in ("loss", "foreground", "threshold"):
        if getattr(settings, name) is not None:
            raise ValueError(
                f"{name} is an option of one mask; with several tasks it is a key of each task in "
                f"{settings.tasks}"
            )


def _check_method_options(settings: FinetuneSettings) -> None:
    """Raise ValueError for an option of another method."""
    method = settings.method
    has = (*OPTIONS[method], *(("relation_lr",) if method in RELATED else ()))
    for name in dict.fromkeys(("relation_lr", *(n for own in OPTIONS.values() for n in own))):
        value = getattr(settings, name)
        if name in has or value is None or value is False:
            continue
        given = f"{name} is {value}"
        if isinstance(value, tuple):
            given = f"{name} {'are' if name == 'slices' else 'is'} {', '.join(value)}"
        lacks = "has no adapters" if method == "decoder" else "has none"
        raise ValueError(f"{given}, but method {method} {LACKS.get((method, name), lacks)}")
