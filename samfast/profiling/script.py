# SPDX-License-Identifier: Apache-2.0
"""A user's own training program, run unchanged until enough of its steps were seen."""

import builtins
import contextlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from samfast.profiling.recorder import TIME, Recorder

_ADVICE = "a step ends at the step of a torch.optim optimizer"


class _Enough(BaseException):
    """Goes through the script, whose finally blocks run."""


def run_script(path: Path, arguments: Sequence[str], plan: list[str], quiet: bool) -> Recorder:
    """Run the script as ``python path arguments…`` does; what was recorded of its steps.

    plan: what happens in each step   quiet: what the script prints goes to stderr
    FileNotFoundError or ValueError, with one sentence, for a script that cannot be read, fails, or
    ends before a step was timed.
    """
    _check_source(path)

    def enough() -> None:
        raise _Enough

    recorder = Recorder(plan, enough=enough)
    out = contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext()
    ended = None
    with _as_main(path, arguments), out:
        try:
            with recorder:
                runpy.run_path(str(path), run_name="__main__")
        except _Enough:
            return recorder
        except SystemExit as stop:
            ended = f"the script ended itself (sys.exit {stop.code!r})"
        except Exception as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"the script {path} failed in step {recorder.step + 1}: "
                f"{type(error).__name__}{': ' + said if said else ''}; nothing was written"
            ) from error
    _check_steps(path, recorder, ended or "the script ended")
    return recorder


def _check_source(path: Path) -> None:
    """One sentence for what python could not run."""
    if not path.exists():
        raise FileNotFoundError(f"the script {path} does not exist")
    if not path.is_file():
        raise ValueError(f"the script {path} is not a file; name a Python program")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ValueError(f"the script {path} cannot be read ({error.strerror})") from error
    try:
        builtins.compile(source, str(path), "exec")
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" in line {line}"
        raise ValueError(f"the script {path} is not Python{where}: {error.args[0]}") from error


def _check_steps(path: Path, recorder: Recorder, ended: str) -> None:
    """ValueError where nothing was timed."""
    wanted, timed = recorder.plan.count(TIME), len(recorder.timed)
    if timed:
        recorder.remark = f"{ended} after {timed} of {wanted} timed steps"
        return
    steps = recorder.step
    if steps == 0 and not recorder.optimizers:
        raise ValueError(f"{ended} without a step, so there is nothing to profile; {_ADVICE}")
    raise ValueError(
        f"{ended} after {steps} steps, but the first {len(recorder.plan) - wanted} are skipped; "
        f"let {path} run longer, or use a smaller --skip"
    )


@contextlib.contextmanager
def _as_main(path: Path, arguments: Sequence[str]):
    """sys.argv and sys.path as the script expects them."""
    argv, path_of_imports = sys.argv, list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, os.fspath(path.resolve().parent))
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path_of_imports
