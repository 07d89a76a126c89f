# SPDX-License-Identifier: Apache-2.0
"""What to try when memory runs out: options of the command that are not used yet.

Importing this loads no torch.
"""

from typing import Any

from samfast.profiling.settings import ProfileSettings
from samfast.training.chosen_tasks import has_tasks
from samfast.training.settings import (
    EvaluateSettings,
    FinetuneSettings,
    PredictSettings,
    WarmupSettings,
)


def memory_advice(settings: Any, main_memory: bool) -> str:
    """Name options that need less memory than the settings, as the end of a sentence.

    settings: of any command, or None   main_memory: True if main memory ran out, not GPU memory
    """
    if isinstance(settings, FinetuneSettings):
        found = _of_training(settings, main_memory)
    elif isinstance(settings, WarmupSettings):
        found = _of_training(FinetuneSettings(**vars(settings)), main_memory=False)
    elif isinstance(settings, (EvaluateSettings, PredictSettings)):
        found = _of_prediction(settings)
    elif isinstance(settings, ProfileSettings):
        found = _of_profile(settings)
    else:
        found = []
    if not found:
        return "no option needs less; use a device with more memory"
    *most, last = found
    return f"try {', '.join(most)} or {last}" if most else f"try {last}"


def _of_training(settings: FinetuneSettings, main_memory: bool) -> list[str]:
    # Nothing is saved of a frozen encoder.
    frozen = settings.method == "decoder" and not has_tasks(settings)
    several = settings.batch_size > 1 or has_tasks(settings)
    found = {
        "--fuse": not settings.fuse,
        "--graph off": settings.graph == "on",
        "--memory minimal": settings.fuse and settings.memory != "minimal" and not frozen,
        "--decoder-chunk 1": settings.decoder_chunk != 1 and several,
        "--no-cache": settings.cache and frozen and main_memory,
        "a smaller --batch-size (with a larger --accumulate)": settings.batch_size > 1,
        "a smaller --image-size": settings.image_size is None or settings.image_size > 16,
    }
    return [option for option, helps in found.items() if helps]


def _of_profile(settings: ProfileSettings) -> list[str]:
    if settings.script is not None:
        return []
    found = {
        "--memory minimal": settings.memory != "minimal",
        "a smaller --batch": settings.batch > 1,
        "a smaller --image-size": settings.image_size is None or settings.image_size > 16,
    }
    return [option for option, helps in found.items() if helps]


def _of_prediction(settings: EvaluateSettings | PredictSettings) -> list[str]:
    found = {
        "--fuse": not settings.fuse,
        "--decoder-chunk 1": settings.decoder_chunk != 1,
        "a smaller --batch-size": settings.batch_size > 1,
    }
    return [option for option, helps in found.items() if helps]
