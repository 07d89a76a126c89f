# SPDX-License-Identifier: Apache-2.0
"""Which cases of a test the quick run takes (tests/marks.py)."""

from types import SimpleNamespace

import pytest
from marks import leave_samples


class Case:
    def __init__(self, *marks):
        self.marks = {mark.name: mark for mark in marks}

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, name):
        self.marks[name] = SimpleNamespace(name=name)


@pytest.mark.parametrize(("step", "quick"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6])])
def test_every_nth_case_stays_quick(step, quick):
    cases = [Case(pytest.mark.sampled(step).mark) for _ in range(7)]
    leave_samples(cases)
    assert [i for i, case in enumerate(cases) if "slow_on_cpu" not in case.marks] == quick


def test_a_test_without_the_mark_keeps_its_cases():
    cases = [Case(), Case()]
    leave_samples(cases)
    assert not any(case.marks for case in cases)
