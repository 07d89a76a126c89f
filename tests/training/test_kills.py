# SPDX-License-Identifier: Apache-2.0
"""SIGKILL from outside, at every event that changes files in a run's folder and inside every write.

Two processes load images, dropout is on, two batches make a step, a state follows every step.
``test_resume`` has a sample of this.
"""

import shutil
import signal
from pathlib import Path

import pytest
from kill_runs import compiler, runs, said
from test_resume import results

OPTIONS = "--model vit_tiny --image-size 64 --epochs 2 --repeats 1 --batch-size 1 --accumulate 2"
OPTIONS += " --dropout 0.1 --lr 3e-3 --overlays 1 --save-every 1 --val-fraction 0.34"
SHARES = 8  # of the sweep, each a test

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="needs a C compiler: cc, gcc or clang"),
]


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    with runs(tmp_path_factory.mktemp("preloaded")) as program:
        yield program


def command(data: Path, output: Path, workers: int) -> list:
    options = [*OPTIONS.split(), "--workers", workers, "--resume"]
    return ["finetune", "--data", data, "--output", output, *options]


@pytest.fixture(scope="module")
def whole(go, shared_data, tmp_path_factory):
    """(results of a run that nothing ended, its events)."""
    place = tmp_path_factory.mktemp("whole")
    output, log = place / "out", place / "events"
    assert go(command(shared_data, output, 2), output, log=log) == 0
    return results(output), log.read_text().splitlines()


def killed_and_finished(go, arguments: list, output: Path, at: int) -> dict | None:
    """The results of a run that was killed at an event and gone on with; None if it never came."""
    shutil.rmtree(output, ignore_errors=True)
    code = go(arguments, output, at)
    if code != 0:
        assert code == -signal.SIGKILL
        assert go(arguments, output) == 0, said(output).read_text()
    found = results(output)
    left = [p for p in output.rglob(".*") if p.name != ".samfast.lock"]
    assert left == [], at
    return found if code else None


@pytest.mark.parametrize("share", range(SHARES))
def test_a_kill_at_any_event_changes_nothing(go, whole, shared_data, tmp_path, share):
    expected, events = whole
    output = tmp_path / "out"
    arguments = command(shared_data, output, 2)
    for at in range(share, len(events), SHARES):
        found = killed_and_finished(go, arguments, output, at)
        assert found in (None, expected), events[at]
