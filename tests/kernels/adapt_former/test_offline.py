# SPDX-License-Identifier: Apache-2.0
"""The Triton stages compile for GPUs that are not here: no spills, no float atomics, memory fits.

Kernels imported under TRITON_INTERPRET cannot be compiled, so each check has its own process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[3]
QUICK = ["86"]  # the others with the slow tests
ALL = ["80", "86", "89", "90", "100", "120"]


def compile_all(archs, *options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.offline", "--archs", *archs, *options]
    command += ["--only", "adapt_former "]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_quick():
    done = compile_all(QUICK, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 compiles of 3 launches, 0 wrong" in done.stdout
    for name in ("low", "low_backward"):
        (row,) = (line for line in done.stdout.splitlines() if f" {name}_kernel " in line)
        assert "MMA" in row


@pytest.mark.slow
def test_every_target_dtype_and_bottleneck():
    done = compile_all(ALL)
    assert done.returncode == 0, done.stdout + done.stderr
