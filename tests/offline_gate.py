# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.offline`` in a process of its own, whose Triton compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[1]
ALL = ["80", "86", "89", "90", "100", "120"]


def gate(*options: str, module: str = "benchmarks.offline") -> tuple[int, str]:
    """Its exit code, and what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
