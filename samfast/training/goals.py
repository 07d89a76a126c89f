# SPDX-License-Identifier: Apache-2.0
"""Which goal settings have: one mask, single objects by prompts, or several tasks; with tiles."""

from collections.abc import Sequence

from samfast.training.chosen_tasks import has_prompted_objects
from samfast.training.goal import Goal
from samfast.training.instances import Instances, are_instances
from samfast.training.many_tasks import ManyTasks
from samfast.training.one_mask import OneMask
from samfast.training.prompted_objects import PromptedObjects
from samfast.training.settings import FinetuneSettings
from samfast.training.tasks import TaskSpec
from samfast.training.tiled_mask import TiledMask
from samfast.training.tiled_tasks import TiledInstances, TiledTasks
from samfast.training.tiles import chosen_tiles


def goal_of(
    settings: FinetuneSettings, specs: Sequence[TaskSpec] | None, only_score: bool = False
) -> Goal:
    """What the settings learn from a folder; finds its files and opens none.

    specs: the tasks, none for one mask and for single objects   only_score: nothing is trained
    """
    if has_prompted_objects(settings):
        return PromptedObjects(settings, only_score)
    tiled = chosen_tiles(settings.tile, settings.overlap) is not None
    if not specs:
        return (TiledMask if tiled else OneMask)(settings, only_score)
    if are_instances(specs):
        return (TiledInstances if tiled else Instances)(settings, specs, only_score)
    return (TiledTasks if tiled else ManyTasks)(settings, specs, only_score)
