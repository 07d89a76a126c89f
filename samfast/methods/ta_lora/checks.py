# SPDX-License-Identifier: Apache-2.0
"""Checks of TA-LoRA's options. Nothing here imports torch."""

import math

from samfast.adapters.checks import check_whole

Ranks = tuple[int, int, int]
MOST_ELEMENTS = 2**28  # of the core (R1, R2, R3)


def check_tasks(tasks: int) -> None:
    """Raise ValueError unless the number of tasks is a whole number of at least 1."""
    check_whole("tasks", tasks)


def check_ranks(ranks: Ranks) -> None:
    """Raise ValueError unless there are three ranks, whole numbers of at least 1."""
    whole = isinstance(ranks, (tuple, list)) and len(ranks) == 3
    if not whole or any(type(rank) is not int or rank < 1 for rank in ranks):
        raise ValueError(f"ranks is {ranks!r}; it must be three whole numbers of at least 1")
    if math.prod(ranks) > MOST_ELEMENTS:
        raise ValueError(f"ranks is {ranks!r}; their product must be at most {MOST_ELEMENTS}")


def check_scaling(scaling: float) -> None:
    """Raise ValueError unless the scaling is a finite number above 0."""
    number = isinstance(scaling, (int, float)) and not isinstance(scaling, bool)
    if not number or not 0 < scaling < float("inf"):
        raise ValueError(f"scaling is {scaling!r}; it must be a finite number above 0")


def check_orthogonality(orthogonality: float) -> None:
    """Raise ValueError unless the penalty's weight is a finite number of at least 0."""
    number = isinstance(orthogonality, (int, float)) and not isinstance(orthogonality, bool)
    if not number or not 0 <= orthogonality < float("inf"):
        raise ValueError(
            f"orthogonality is {orthogonality!r}; it must be a finite number, 0 for none"
        )


def check_names(names: tuple[str, ...]) -> None:
    """Raise ValueError if there are no task names, or one is empty or given twice."""
    for name in names:
        if not isinstance(name, str) or not name or name == "all":
            raise ValueError(f"tasks has {name!r}, which is not a task name")
        if list(names).count(name) > 1:
            raise ValueError(f"tasks names {name!r} twice")
    if not names:
        raise ValueError("tasks is empty; it must name at least one")
