# SPDX-License-Identifier: Apache-2.0
"""A command with a time limit, at which all its processes end."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path


def run(command, seconds: float, cwd: Path | None = None, env=None) -> tuple[int | None, float]:
    """(exit status or None where it was stopped, seconds it took).

    command: a list, or a line for bash. It runs as a process group of its own, so that what it
    started ends with it.
    """
    start = time.monotonic()
    command = ["bash", "-c", command] if isinstance(command, str) else command
    process = subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, time.monotonic() - start
