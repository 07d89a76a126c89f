# SPDX-License-Identifier: Apache-2.0
"""Marks that say which cases of a test wait for `make test-slow`.

``slow_on_cpu`` takes long without a GPU, so it waits for `make test-slow`; ``gpu`` needs a GPU.

    @pytest.mark.slow_on_cpu                        every case of the test
    @pytest.mark.slow_on_cpu("triton", "cpu-half")  the cases whose id has one of these parts
    @pytest.mark.slow_on_cpu(but=["torch"])         all cases but those

A part is the id of one parameter, or of several in a row, as pytest prints it between dashes.

    @pytest.mark.sampled(3)                         of every three cases, the second and third

Grids need no mark: of the cases of a test with two parameters or more, the quick run takes as many
as it needs to have each value of each parameter once. The others wait for `make test-slow` too.
A list of sentences, each a case, takes ``sampled``.
"""

import re

import pytest

NAMES = ("slow_on_cpu", "gpu")
LATER = ("slow", "slow_on_cpu", "gpu")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)  # among the backends of a test


def keep_where_meant(cases, strict):
    """Take a mark from the cases of one test that it does not mean.

    strict: a part that no case has is an error
    """
    for mark in [mark for mark in cases[0].own_markers if mark.name in NAMES]:
        but = mark.kwargs.get("but", ())
        for part in (*mark.args, *but):
            if strict and not any(_has(case, part) for case in cases):
                raise ValueError(f"{mark.name} of {cases[0].originalname}: no case has {part!r}")
        for case in cases:
            named = any(_has(case, part) for part in (*mark.args, *but))
            if (mark.args and not named) or (but and named):
                case.own_markers.remove(mark)


def leave_samples(cases):
    """Of a test with ``sampled(n)``, mark ``slow_on_cpu`` all but every n-th case."""
    if (mark := cases[0].get_closest_marker("sampled")) is not None:
        (step,) = mark.args
        for i, case in enumerate(cases):
            if i % step:
                case.add_marker("slow_on_cpu")


def leave_each_value_once(cases):
    """Mark ``slow_on_cpu`` what else the cases of one test hold, each taking what lacks most."""
    quick = [case for case in cases if not any(map(case.get_closest_marker, LATER))]
    values = {case: set(enumerate(_values(case))) for case in quick}
    lacking = set().union(*values.values())
    while lacking:
        taken = max(quick, key=lambda case: len(values[case] & lacking))  # the first of these
        lacking -= values.pop(taken)
        quick.remove(taken)
    for case in quick if len(cases) > 1 else ():
        case.add_marker("slow_on_cpu")


def _values(case):
    ids = case.callspec._idlist if hasattr(case, "callspec") else []
    return [id for id in ids if not re.fullmatch(r"draw\d+", id)]  # of --draws


def _has(case, part):
    if not hasattr(case, "callspec"):
        return False
    id = re.sub(r"(^|-)draw\d+(?=-|$)", "", case.callspec.id)  # of --draws
    return f"-{part}-" in f"-{id}-".replace("--", "-")
