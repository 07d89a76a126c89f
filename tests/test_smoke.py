# SPDX-License-Identifier: Apache-2.0
"""The list of the GPU's smoke tests is complete and short; its results survive a stop."""

import difflib
import math
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from gpu import planted, proofs, smoke_cases, test_smoke
from gpu.smoke_cases import kernels
from junit_now import JunitNow

from benchmarks import smoke, timed
from samfast.info import OPERATIONS
from samfast.kernels.relpos_attention import triton_kernels

ROOT = Path(__file__).parents[1]
MOST = 150
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_at_most_so_many():
    functions = [f for name, f in vars(test_smoke).items() if name.startswith("test_")
                 and callable(f)]  # fmt: skip
    grids = [
        [len(mark.args[1]) for mark in getattr(f, "pytestmark", ()) if mark.name == "parametrize"]
        for f in functions
    ]
    assert len(functions) == 6
    assert 100 <= sum(math.prod(grid) for grid in grids) <= MOST


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_kernel_in_every_dtype(operation):
    assert kernels(operation)
    for dtype in DTYPES:
        if "takes" in (proofs.missing(operation, "triton", dtype) or ""):
            continue
        values = [value.values for value in test_smoke.VALUES]
        named = {name for row, backend, kind in values for name in row.kernels
                 if (row.operation, backend, kind) == (operation, "triton", dtype)}  # fmt: skip
        not_in = smoke_cases.IN_16_BITS if dtype == torch.float32 else set()
        assert named == kernels(operation) - not_in


def test_rows_are_what_the_kernels_take():
    assert smoke_cases.FLOAT32_HEAD == triton_kernels.FLOAT32_HEAD


def test_every_cuda_source_in_every_dtype():
    native = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    values = [value.values for value in test_smoke.VALUES]
    for dtype in DTYPES:
        assert {
            r.operation for r, backend, k in values if (backend, k) == ("cuda", dtype)
        } == native


@pytest.mark.parametrize("operation", planted.PLANTS)
def test_what_is_planted_is_the_barrier_alone(operation, tmp_path):
    right, wrong = (text.splitlines() for text in planted.sources(operation))
    changed = [line for line in difflib.ndiff(right, wrong) if line[0] in "+-"]
    assert len(changed) == planted.PLANTS[operation][2]
    assert all(line[0] == "-" and line[1:].strip().startswith(planted.BARRIER) for line in changed)
    made = planted.variant(operation, tmp_path)
    assert getattr(made, planted.PLANTS[operation][1]).fn.__module__ == f"planted_{operation}"


def test_every_barrier_of_a_kernel_is_planted():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*/triton_*.py")]
    planted_ones = sum(count for _, _, count in planted.PLANTS.values())
    assert sum(text.count(planted.BARRIER) for text in texts) == planted_ones
    assert test_smoke.HAZARDS.keys() == planted.PLANTS.keys()


@pytest.mark.slow_on_cpu
def test_what_is_planted_compiles():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    command = [sys.executable, "-m", "gpu.planted"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        f"planted_{operation}" for operation in planted.PLANTS
    ]


class Report:
    """What pytest tells of a phase of a test."""

    def __init__(self, nodeid, when, outcome="passed", longrepr=""):
        self.nodeid, self.when, self.outcome, self.longrepr = nodeid, when, outcome, longrepr
        self.duration, self.skipped = 0.5, outcome == "skipped"


def test_results_are_whole_after_every_test(tmp_path):
    path = tmp_path / "a" / "smoke.xml"
    junit = JunitNow(path)

    def told():
        return {
            case.attrib["name"]: [child.tag for child in case]
            for case in ElementTree.parse(path).getroot().iter("testcase")
        }

    assert told() == {}
    for when in ("setup", "call", "teardown"):
        assert told() == {}  # a test is not done before its teardown
        junit.pytest_runtest_logreport(Report("f.py::good[<a>]", when))
    assert told() == {"good[<a>]": []}
    junit.pytest_runtest_logreport(Report("f.py::bad", "call", "failed", "E  \x1b[31mno & no"))
    assert told() == {"good[<a>]": [], "bad": ["failure"]}
    junit.pytest_runtest_logreport(Report("f.py::bad", "teardown"))
    junit.pytest_runtest_logreport(Report("f.py::out", "setup", "skipped", ("f", 1, "Skipped")))
    assert told() == {"good[<a>]": [], "bad": ["failure"], "out": ["skipped"]}
    assert smoke.outcomes(path) == {
        "f.py::good[<a>]": "passed", "f.py::bad": "failed", "f.py::out": "skipped",
    }  # fmt: skip
    (case,) = ElementTree.parse(path).getroot().findall(".//testcase[@name='good[<a>]']")
    assert case.attrib["time"] == "1.500" and case.attrib["classname"] == "f.py"


@pytest.mark.slow_on_cpu
def test_a_command_that_hangs_ends_with_what_it_started(tmp_path):
    code, seconds = timed.run(f"sleep 60 & echo $! >{tmp_path}/child; wait", 1.0)
    assert code is None and seconds < 30
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    for _ in range(100):  # a busy system takes its time to end it
        ended = not state.exists() or state.read_text().split()[2] == "Z"
        if ended:
            break
        time.sleep(0.1)
    assert ended
    assert timed.run("exit 3", 30)[0] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_a_sentence(capsys):
    for arguments in ([], ["--look"]):
        assert smoke.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "needs a CUDA device" in line and "run it on a GPU" in line


def test_without_torch_a_sentence(monkeypatch):
    monkeypatch.setattr(smoke.importlib.util, "find_spec", lambda name: None)
    assert "torch is not installed" in smoke.no_gpu()


def test_results_of_no_run(tmp_path):
    assert smoke.outcomes(tmp_path / "none.xml") == {}
