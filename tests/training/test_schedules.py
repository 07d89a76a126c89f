# SPDX-License-Identifier: Apache-2.0
"""Learning rates: torch's own schedules by name, their states, and what is no schedule."""

import pytest
import torch
from torch.optim import lr_scheduler

from samfast.training.schedules import Schedule, check_schedule, parsed_schedule

STEPS = 12
TORCH = {
    "StepLR(step_size=5, gamma=0.5)": lambda o: lr_scheduler.StepLR(o, 5, 0.5),
    "MultiStepLR(milestones=[2, 7])": lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    "ExponentialLR(gamma=0.9)": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingLR(T_max=3)": lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
    "CosineAnnealingWarmRestarts(T_0=4)": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "PolynomialLR(power=2.0)": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.0),
    "CyclicLR(base_lr=1e-3, max_lr=1e-2, step_size_up=3)": lambda o: lr_scheduler.CyclicLR(
        o, 1e-3, 1e-2, 3
    ),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [1e-2, 1e-3], STEPS),
}


def optimizer() -> torch.optim.AdamW:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1e-2, 1e-3)]
    found = torch.optim.AdamW(groups)
    for group in found.param_groups:
        group["params"][0].grad = torch.zeros(2)
    return found


def rates(own, step) -> list[list[float]]:
    found = []
    for _ in range(STEPS):
        found.append([group["lr"] for group in own.param_groups])
        own.step()
        step()
    return found


@pytest.mark.parametrize("name", TORCH)
def test_torch_s_schedules(name):
    own, theirs = optimizer(), optimizer()
    check_schedule(name)
    assert rates(own, Schedule(own, name, STEPS).step) == rates(theirs, TORCH[name](theirs).step)


@pytest.mark.parametrize("name", ["cosine", "polynomial", "constant", *TORCH])
def test_a_schedule_goes_on_from_its_state(name):
    whole = optimizer()
    expected = rates(whole, Schedule(whole, name, STEPS).step)
    own = optimizer()
    schedule = Schedule(own, name, STEPS)
    for _ in range(7):
        own.step()
        schedule.step()
    again = optimizer()
    resumed = Schedule(again, name, STEPS)
    resumed.go_on(schedule.done, schedule.scores)
    assert resumed.lr() == expected[7][0]
    found = []
    for _ in range(7, STEPS):
        found.append([group["lr"] for group in again.param_groups])
        again.step()
        resumed.step()
    assert found == expected[7:]


def test_a_plateau_is_one_of_the_score():
    own = optimizer()
    schedule = Schedule(own, "ReduceLROnPlateau(patience=0, factor=0.5)", STEPS)
    seen = []
    for score in (0.5, 0.6, 0.6, 0.7, 0.1):
        own.step()
        schedule.step()  # of a step: nothing
        schedule.end_epoch(score)
        seen.append(schedule.lr())
    assert seen == [1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3]


@pytest.mark.parametrize(
    "name, pattern",
    [
        ("linear", "unknown schedule 'linear'; known are cosine, polynomial, constant, and those"),
        ("StepLR", "schedule 'StepLR', in 10 steps: .*step_size"),
        ("StepLR(5)", r"unknown schedule 'StepLR\(5\)'"),
        ("StepLR(step_size=many)", "unknown schedule"),
        ("StepLR(**{'step_size': 5})", "unknown schedule"),
        ("StepLR(step_size='many')", "schedule .*StepLR"),
        ("StepLR(step_size=0)", "schedule .*StepLR"),
        ("LRScheduler", "unknown schedule"),
        ("LambdaLR", "schedule 'LambdaLR'"),
        ("SequentialLR(schedulers=[], milestones=[])", "schedule"),
        ("__import__('os').getcwd()", "unknown schedule"),
        ("StepLR(step_size=1", "unknown schedule"),
        ("", "unknown schedule"),
        ("OneCycleLR(pct_start=2.0)", "schedule .*pct_start"),
        ("OneCycleLR(total_steps=7)", r"total_steps=7\)', in 10 steps: Tried to step"),
        ("CosineAnnealingLR(T_max=0)", "schedule .*T_max"),
        ("StepLR(step_size=3, last_epoch=5)", "last_epoch is set by samfast"),
        ("ExponentialLR(gamma=-1)", "it gives the learning rate -1"),
    ],
)
def test_what_is_no_schedule(name, pattern):
    with pytest.raises(ValueError, match=pattern) as error:
        check_schedule(name)
    assert "\n" not in str(error.value)


def test_the_arguments_are_read():
    assert parsed_schedule("StepLR(step_size=5, gamma=0.5)") == (
        "StepLR",
        {"step_size": 5, "gamma": 0.5},
    )
