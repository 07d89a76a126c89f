# SPDX-License-Identifier: Apache-2.0
"""The tasks of the settings: from a file, as classes, or as objects without prompts."""

from samfast.training.settings import FinetuneSettings
from samfast.training.tasks import TaskSpec, read_tasks

CLASSES = "classes"
INSTANCES = (
    TaskSpec("foreground", derive="foreground"),
    TaskSpec("centre", kind="regression", derive="centre"),
    TaskSpec("depth", kind="regression", derive="depth"),
)


def masks_of(settings: FinetuneSettings) -> str:
    """What a mask holds: "binary", "classes" or "instances"; --classes implies classes."""
    if settings.masks is not None:
        return settings.masks
    return "binary" if settings.classes is None else CLASSES


def has_tasks(settings: FinetuneSettings) -> bool:
    """True if several decoders are trained; opens no file."""
    masks = masks_of(settings)
    unprompted = masks == "instances" and settings.prompt == "none"
    return settings.tasks is not None or masks == CLASSES or unprompted


def has_prompted_objects(settings: FinetuneSettings) -> bool:
    """True if single objects are learned, each from its own prompt; opens no file."""
    masks = masks_of(settings)
    return settings.tasks is None and masks == "instances" and settings.prompt != "none"


def specs_of(settings: FinetuneSettings) -> tuple[TaskSpec, ...] | None:
    """Return the tasks, or None for one mask or one object at a time; reads the tasks file."""
    if not has_tasks(settings):
        return None
    if settings.tasks is not None:
        return read_tasks(settings.tasks)
    if masks_of(settings) == CLASSES:
        ignore = settings.ignore or ()
        return (TaskSpec(CLASSES, kind="semantic", channels=_classes(settings), ignore=ignore),)
    return INSTANCES


def check_masks(settings: FinetuneSettings) -> None:
    """Raise ValueError for options that belong to other kinds of masks."""
    masks, classes = masks_of(settings), settings.classes
    if settings.tasks is not None:
        for name in ("masks", "classes"):
            if getattr(settings, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(settings, name)}, but --tasks says what masks hold; "
                    "leave out one of them"
                )
        return
    if masks == CLASSES:
        _classes(settings)
    if masks != CLASSES and classes is not None:
        raise ValueError(f"classes is {classes}, but masks is {masks}; give --masks classes")
    if masks == CLASSES and settings.prompt != "none":
        raise ValueError(
            f"prompt is {settings.prompt}, but classes take no prompts; leave out --prompt"
        )
    _check_prompts(settings, masks)
    if masks == "binary":
        return
    if has_prompted_objects(settings) and settings.augment == "strong":
        raise ValueError(
            "augment is strong, which may move prompted objects out of images; use --augment light"
        )
    for name in ("foreground", "threshold", *(["ignore"] if masks == "instances" else [])):
        if getattr(settings, name) is not None:
            raise ValueError(
                f"{name} is an option for binary masks, but masks is {masks}; leave it out"
            )
    if has_tasks(settings) and settings.loss is not None:
        raise ValueError(
            f"loss is {settings.loss}, an option for one mask, but masks is {masks}; leave it out"
        )


def _classes(settings: FinetuneSettings) -> int:
    """The number of classes; raises ValueError if it is not given."""
    if settings.classes is None:
        raise ValueError("masks is classes, but their number is missing; give --classes N")
    return settings.classes


def _check_prompts(settings: FinetuneSettings, masks: str) -> None:
    """Raise ValueError for options of prompted objects if there are none."""
    if has_prompted_objects(settings):
        return
    if settings.prompt == "mixed":
        raise ValueError(
            f"prompt is mixed, which is for prompted objects, but masks is {masks}; give --masks "
            "instances, or --prompt box or point"
        )
    for name in ("prompt_rounds", "objects"):
        if getattr(settings, name) is not None:
            raise ValueError(
                f"{name} is {getattr(settings, name)}, which is for prompted objects, but masks "
                f"is {masks} and prompt {settings.prompt}; give --masks instances and --prompt "
                "box, point or mixed"
            )
