# SPDX-License-Identifier: Apache-2.0
"""Broken data sets in COCO's format: one sentence each, no crash, nothing read elsewhere."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from coco_mutations import KINDS, mutate, write_good

pytest.importorskip("pycocotools")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and pipes of Linux")
RUNS = Path(__file__).with_name("coco_runs.py")


QUICK = [*range(25), 30, 107, 202]  # the last ones are links that leave the folder


def read_all(folder: Path, seeds: Sequence[int]) -> dict[int, dict]:
    """What reading each broken data set came to, by seed; fails where a process crashed."""
    folder.mkdir(exist_ok=True)
    good = write_good(folder / "good")
    folders = {str(mutate(folder / str(seed), seed)): seed for seed in seeds}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(RUNS), str(good), *folders],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    last = lines[-1] if lines else {}
    culprit = (
        f"seed {folders.get(last.get('begins'))}: exit {done.returncode}\n{done.stderr[-3000:]}"
    )
    assert done.returncode == 0, culprit
    ends = {folders[line["ends"]]: line for line in lines if "ends" in line}
    assert sorted(ends) == sorted(seeds)
    return ends


def check(ends: dict[int, dict]) -> None:
    for seed, end in ends.items():
        assert end["outside"] == [], (seed, end)
        if end["kind"] is None:
            continue
        sentence = end["sentence"]
        assert "\n" not in sentence and 20 < len(sentence) < 700, (seed, sentence)
        assert "all.json" in sentence, (seed, sentence)  # who is to be mended
        assert "canary" not in sentence or seed % len(KINDS) == 2, (seed, sentence)
    refused = Counter(seed % len(KINDS) for seed, end in ends.items() if end["kind"])
    assert len(refused) == len(KINDS)  # of every kind
    assert sum(refused.values()) > 0.6 * len(ends)


def test_some_broken_ones(tmp_path):
    check(read_all(tmp_path, QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
def test_many_broken_ones(tmp_path, part):
    check(read_all(tmp_path, range(28 + part * 105, 28 + (part + 1) * 105)))


def test_a_crash_is_told(tmp_path, monkeypatch):
    """A process that dies fails the test, and says at which data set."""
    fake = tmp_path / "dies.py"
    fake.write_text(
        "import json, os, sys\n"
        "print(json.dumps({'begins': sys.argv[2]}), flush=True)\n"
        "os.kill(os.getpid(), 11)\n"
    )
    monkeypatch.setitem(globals(), "RUNS", fake)
    with pytest.raises(AssertionError, match="seed 5: exit -11"):
        read_all(tmp_path / "all", range(5, 7))
