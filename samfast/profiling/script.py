# SPDX-License-Identifier: Apache-2.0
"""Run a user's training program unchanged until enough of its steps are recorded."""

import builtins
import contextlib
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from samfast.profiling.recorder import TIME, Recorder

_ADVICE = "a step ends when a torch.optim optimizer steps"


class _Enough(BaseException):
    """Goes through the script, whose finally blocks run."""


def run_script(path: Path, arguments: Sequence[str], plan: list[str], quiet: bool) -> Recorder:
    """Run the script as ``python path arguments…`` does; return what was recorded of its steps.

    plan: what happens in each step   quiet: what the script prints goes to stderr
    Raises FileNotFoundError or ValueError for a script that cannot be read, fails, or ends
    before a step is timed.
    """
    _check_source(path)

    def enough() -> None:
        raise _Enough

    recorder = Recorder(plan, enough=enough)
    with _as_main(path, arguments), _on_stderr() if quiet else contextlib.nullcontext():
        try:
            with recorder:
                runpy.run_path(str(path), run_name="__main__")
        except _Enough:
            return recorder
        except (SystemExit, _Left) as stop:
            if stop.code not in (None, 0) and not _is_through(recorder):
                said = " ".join(str(stop.code).split())
                raise ValueError(
                    f"the script {path} ended itself in step {recorder.step + 1} with sys.exit"
                    f"({said}); nothing was written"
                ) from stop
        except Exception as error:
            said = " ".join(str(error).split())
            if _is_through(recorder):
                recorder.remarks.append(f"after its timed steps the script failed: {said}")
                return recorder
            if recorder.is_counting and "savedtensorhooks" in said.lower().replace(" ", ""):
                raise ValueError(
                    f"the script {path} cannot be profiled: what step {recorder.step + 1} saves "
                    f"for its backward cannot be counted ({said[:100]}); nothing was written"
                ) from error
            raise ValueError(
                f"the script {path} failed in step {recorder.step + 1}: "
                f"{type(error).__name__}{': ' + said if said else ''}; nothing was written"
            ) from error
    _check_steps(path, recorder)
    return recorder


class _Left(BaseException):
    """os._exit was called, which would take the profile with it."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def _is_through(recorder: Recorder) -> bool:
    return recorder.timed >= recorder.plan.count(TIME)


@contextlib.contextmanager
def _on_stderr() -> Iterator[None]:
    """What is printed goes to stderr, also by other programs that the script starts."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            os.dup2(2, 1)
            yield
    finally:
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
        os.dup2(kept, 1)
        os.close(kept)


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


def _check_steps(path: Path, recorder: Recorder) -> None:
    """ValueError where nothing was timed."""
    wanted, timed = recorder.plan.count(TIME), recorder.timed
    if timed >= wanted:
        return
    if recorder.held and not timed:
        raise ValueError(
            f"the script {path} cannot be profiled: its steps end inside its own torch dispatch "
            "mode, where nothing can be counted"
        )
    if timed:
        recorder.remarks.append(f"the script ended after {timed} of {wanted} timed steps")
        return
    steps, skipped = recorder.step, len(recorder.plan) - wanted
    if steps == 0 and not recorder.optimizers:
        raise ValueError(f"the script {path} ended without a step; {_ADVICE}")
    raise ValueError(
        f"the script {path} ended after {steps} steps, but the first {skipped} are "
        "skipped; let it run longer, or use a smaller --skip"
    )


@contextlib.contextmanager
def _as_main(path: Path, arguments: Sequence[str]) -> Iterator[None]:
    """sys.argv and sys.path as the script expects them."""
    argv, path_of_imports = sys.argv, list(sys.path)
    leave: Any = os._exit
    own = os.getpid()

    def leave_kindly(code: int = 0) -> NoReturn:
        if os.getpid() != own:
            leave(code)
        raise _Left(code)

    sys.argv = [str(path), *arguments]
    sys.path.insert(0, os.fspath(path.resolve().parent))
    os._exit = leave_kindly  # type: ignore[assignment]  # its argument has another name
    try:
        yield
    finally:
        os._exit = leave
        sys.argv = argv
        sys.path[:] = path_of_imports
