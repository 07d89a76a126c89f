# SPDX-License-Identifier: Apache-2.0
"""The mark ``slow_on_cpu``: takes long without a GPU, so it waits for `make test-slow`.

    @pytest.mark.slow_on_cpu                        every case of the test
    @pytest.mark.slow_on_cpu("triton", "cpu-half")  the cases whose id has one of these parts
    @pytest.mark.slow_on_cpu(but=["torch"])         all cases but those

A part is the id of one parameter, or of several in a row, as pytest prints it between dashes.
"""

NAME = "slow_on_cpu"


def keep_where_meant(cases, strict):
    """Take the mark from the cases of one test that it does not mean.

    strict: a part that no case has is an error
    """
    for mark in [mark for mark in cases[0].own_markers if mark.name == NAME]:
        but = mark.kwargs.get("but", ())
        for part in (*mark.args, *but):
            if strict and not any(_has(case, part) for case in cases):
                raise ValueError(f"{NAME} of {cases[0].originalname}: no case has {part!r}")
        for case in cases:
            named = any(_has(case, part) for part in (*mark.args, *but))
            if (mark.args and not named) or (but and named):
                case.own_markers.remove(mark)


def _has(case, part):
    return hasattr(case, "callspec") and f"-{part}-" in f"-{case.callspec.id}-"
