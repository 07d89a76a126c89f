# SPDX-License-Identifier: Apache-2.0
"""Launch plans beside JITFunction.run, under the stand-in driver, and what a block costs its host.

Tests import kernels for the interpreter, so what launches runs in processes of their own.
"""

import json
import os
import subprocess
import sys

import pytest
from offline_gate import ROOT

pytest.importorskip("triton", reason="triton is not installed")
PROGRAM = ROOT / "tests" / "instruments" / "plan_launches.py"
# Calls of Python's functions of samfast and calls through torch's dispatcher, a block forward and
# backward. Without plans and what a block remembers: LoRA 1125 and 311.
MOST = {"LoRA": (68, 68), "Conv-LoRA": (84, 146), "COBOT": (71, 68), "TA-LoRA": (75, 88)}


def told(*command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("cases", [["windows"], pytest.param([], marks=pytest.mark.slow)])
def test_launches_are_those_of_the_ordinary_way(cases):
    """Odd places, places 16 bytes on and other strides: the same code, grids and arguments, and
    none of them by JITFunction.run."""
    found = told(PROGRAM, *cases)
    assert found.pop("refused") == found.pop("broken") == []
    assert len(found) == (9 if cases else 36)
    for what, call in found.items():
        assert call["differ"] == [], what
        ordinary, planned = call["launches"]
        assert ordinary == planned >= 25, what
        assert call["runs"] == [ordinary, 0], what
        assert "Tensor" not in call["kinds"], what


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("place", ["windowed", pytest.param("global", marks=pytest.mark.slow)])
def test_calls_of_a_block(place):
    options = ("--repeats", 1, "--json", "--place", place, "--of", *MOST)
    found = told("-m", "benchmarks.host", *options)
    for method, (python, dispatched) in MOST.items():
        cost = found[f"{method}, {place}"]
        assert 0 < cost["python"] <= python, (method, cost)
        assert 0 < cost["aten"] <= dispatched, (method, cost)
        assert cost["launches"] >= 12, (method, cost)
