# SPDX-License-Identifier: Apache-2.0
"""The tasks that settings name: by a file, as classes, or as objects that no prompt points at."""

from samfast.training.settings import FinetuneSettings
from samfast.training.tasks import TaskSpec, read_tasks

CLASSES = "classes"
INSTANCES = (
    TaskSpec("foreground", derive="foreground"),
    TaskSpec("centre", kind="regression", derive="centre"),
    TaskSpec("depth", kind="regression", derive="depth"),
)


def masks_of(settings: FinetuneSettings) -> str:
    """What a mask holds: "binary", "classes" or "instances"; --classes alone says classes."""
    if settings.masks is not None:
        return settings.masks
    return "binary" if settings.classes is None else CLASSES


def has_tasks(settings: FinetuneSettings) -> bool:
    """Whether several decoders are trained; opens no file."""
    masks = masks_of(settings)
    unprompted = masks == "instances" and settings.prompt == "none"
    return settings.tasks is not None or masks == CLASSES or unprompted


def has_prompted_objects(settings: FinetuneSettings) -> bool:
    """Whether single objects are learned, each by a prompt of its own; opens no file."""
    masks = masks_of(settings)
    return settings.tasks is None and masks == "instances" and settings.prompt != "none"


def specs_of(settings: FinetuneSettings) -> tuple[TaskSpec, ...] | None:
    """The tasks, None where there is one mask or one object at a time; reads the file of tasks."""
    if not has_tasks(settings):
        return None
    if settings.tasks is not None:
        return read_tasks(settings.tasks)
    if masks_of(settings) == CLASSES:
        ignore = settings.ignore or ()
        return (TaskSpec(CLASSES, kind="semantic", channels=settings.classes, ignore=ignore),)
    return INSTANCES


def check_masks(settings: FinetuneSettings) -> None:
    """Raise ValueError for options of other kinds of masks."""
    masks, classes = masks_of(settings), settings.classes
    if settings.tasks is not None:
        for name in ("masks", "classes"):
            if getattr(settings, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(settings, name)}, but --tasks says what masks hold; leave "
                    "one out"
                )
        return
    if masks == CLASSES and classes is None:
        raise ValueError("masks is classes, but not how many; give it with --classes N")
    if masks != CLASSES and classes is not None:
        raise ValueError(f"classes is {classes}, but masks is {masks}; give --masks classes")
    if masks == CLASSES and settings.prompt != "none":
        raise ValueError(f"prompt is {settings.prompt}, but classes have no prompts")
    _check_prompts(settings, masks)
    if masks == "binary":
        return
    if has_prompted_objects(settings) and settings.augment == "strong":
        raise ValueError(
            "augment is strong, which moves objects out of images, but a step counts its objects "
            "beforehand; take --augment light"
        )
    for name in ("foreground", "threshold", *(["ignore"] if masks == "instances" else [])):
        if getattr(settings, name) is not None:
            raise ValueError(f"{name} is an option of binary masks, but masks is {masks}")
    if has_tasks(settings) and settings.loss is not None:
        raise ValueError(f"loss is {settings.loss}, an option of one mask, but masks is {masks}")


def _check_prompts(settings: FinetuneSettings, masks: str) -> None:
    """Raise ValueError for options of objects that have prompts of their own."""
    if has_prompted_objects(settings):
        return
    if settings.prompt == "mixed":
        raise ValueError(
            f"prompt is mixed, which is for single objects, but masks is {masks}; give --masks "
            "instances, or --prompt box or point"
        )
    for name in ("prompt_rounds", "objects"):
        if getattr(settings, name) is not None:
            raise ValueError(
                f"{name} is {getattr(settings, name)}, which is for single objects that have "
                f"prompts, but masks is {masks} and prompt {settings.prompt}; give --masks "
                "instances and --prompt box, point or mixed"
            )
