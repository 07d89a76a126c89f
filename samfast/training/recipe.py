# SPDX-License-Identifier: Apache-2.0
"""What training takes where the settings leave it open, and the method that they name."""

import dataclasses
from collections.abc import Sequence

from samfast.adapters.method import Method
from samfast.methods.registry import VARIANTS
from samfast.models import Task
from samfast.models.sam3_folder import NAME as SAM3
from samfast.training.chosen_tasks import has_prompted_objects
from samfast.training.sam3_layers import for_sam3
from samfast.training.settings import OBJECTS, RANDOM_LR, FinetuneSettings
from samfast.training.sides import model_side

BOX_JITTER_SHARE = 50  # of the image's side: 20 pixels of 1024, as many as in SAM's own training


def with_recipe(settings: FinetuneSettings) -> FinetuneSettings:
    """The settings with what they leave open as their method's recipe has it."""
    method = VARIANTS[settings.method]
    recipe = {**method.recipe, **{option.name: option.default for option in method.options()}}
    recipe["lr"] = RANDOM_LR if settings.checkpoint is None else method.checkpoint_lr
    if method.relation is not None and method.relation.share is not None:
        recipe["relation_lr"] = method.relation.share * (settings.lr or recipe["lr"])
    if has_prompted_objects(settings):
        recipe |= {"prompt_rounds": 1, "objects": OBJECTS}
    if settings.prompt in ("box", "mixed"):
        recipe["box_jitter"] = float(round(model_side(settings) / BOX_JITTER_SHARE))
    open_ = {name: value for name, value in recipe.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, **open_)


def method_of(settings: FinetuneSettings, tasks: Sequence[Task] | None = None) -> Method:
    """What the settings attach; ValueError when an option of it is wrong."""
    method = VARIANTS[settings.method]
    names = tuple(task.name for task in tasks or ())
    method = method.with_options(vars(with_recipe(settings)), names)
    return for_sam3(method) if settings.model == SAM3 else method
