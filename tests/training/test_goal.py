# SPDX-License-Identifier: Apache-2.0
"""All goals are what ``samfast.training.goal`` says that a goal is."""

import inspect

import pytest

from samfast.training.dataset_goal import DatasetGoal
from samfast.training.goal import Goal
from samfast.training.many_tasks import ManyTasks
from samfast.training.one_mask import OneMask
from samfast.training.prompted_objects import PromptedObjects
from samfast.training.tiled_mask import TiledMask
from samfast.training.tiled_tasks import TiledInstances, TiledTasks

GOALS = [OneMask, ManyTasks, DatasetGoal, PromptedObjects, TiledMask, TiledTasks, TiledInstances]


@pytest.mark.parametrize("goal", GOALS)
def test_a_goal_has_every_method(goal):
    asked = {name: member for name, member in vars(Goal).items() if inspect.isfunction(member)}
    asked = {name: member for name, member in asked.items() if not name.startswith("_")}
    assert len(asked) == 19
    for name, member in asked.items():
        wanted, found = (inspect.signature(f).parameters for f in (member, getattr(goal, name)))
        assert len(found) == len(wanted), name
        defaults = [[p.default for p in parameters.values()] for parameters in (wanted, found)]
        assert defaults[0] == defaults[1], name
