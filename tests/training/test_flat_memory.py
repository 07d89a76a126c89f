# SPDX-License-Identifier: Apache-2.0
"""What a run holds does not grow with the number of its steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 200
ALLOWED = 2 * 2**20  # bytes, up or down
STORAGES = 4  # the last batch has none after it that was loaded


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and malloc_trim of glibc")
@pytest.mark.parametrize("workers", [0, 2])
def test_two_hundred_steps_hold_what_ten_hold(shared_data, tmp_path, workers):
    """Storages, their bytes and resident bytes after steps 10, 20 ... 200 of one epoch.

    glibc gives back what is free, so that only what is held counts: with its own thresholds, which
    move, resident bytes jump by 2 MB once, at no certain step.
    """
    settings = {
        "data": str(shared_data),
        "output": str(tmp_path / "out"),
        "model": "vit_tiny",
        "image_size": 64,
        "epochs": 1,
        "repeats": 2 * STEPS // 5,  # of five images, in pairs
        "workers": workers,
        "overlays": 0,
        "json": True,  # the running text goes to stderr
    }
    command = [sys.executable, str(Path(__file__).with_name("step_memory.py"))]
    done = subprocess.run(
        [*command, json.dumps(settings)],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == list(range(10, STEPS + 1, 10))
    first = rows[0]
    for step, storages, size, resident in rows[1:]:
        assert abs(storages - first[1]) <= STORAGES, step
        assert abs(size - first[2]) <= ALLOWED, step
        assert abs(resident - first[3]) <= ALLOWED, (step, resident - first[3])
