# SPDX-License-Identifier: Apache-2.0
"""What a run says of the time."""

import pytest

from samfast.training.progress import duration, time_left


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (45.4, "45 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (12 * 60 + 20, "12 min"),
        (3600 - 20, "1 h"),
        (3600 * 3 + 60 * 20, "3 h 20 min"),
        (3600 * 50 + 31, "50 h 1 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_is_that_of_the_mean_epoch():
    assert time_left(90.0, 3, 17) == "8 min left"  # 30 s an epoch
    assert time_left(90.0, 3, 0) == ""
