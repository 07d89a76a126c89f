# SPDX-License-Identifier: Apache-2.0
"""A program that runs ``samfast`` in children which die at an event of ``kill_at.c``.

It loads everything once; a child is a fork. Each line on its input is JSON: arguments, folder, the
event to die at (its number, -1 for none, or a part of its name), and where to write the events'
names. It answers each with a line: the child's exit code (negative for a signal).
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).parent


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def said(folder: Path | str) -> Path:
    """The file that has the standard error of the last child in a folder."""
    return Path(f"{folder}.err")


class Runs:
    """The program from outside."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def __call__(
        self, arguments: list, folder: Path, at: int | str = -1, log: Path | None = None
    ) -> int:
        told = {"argv": [str(a) for a in arguments], "folder": str(folder), "at": at}
        told["log"] = None if log is None else str(log)
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def runs(place: Path) -> Iterator[Runs]:
    """Compile what is preloaded into ``place``, and start the program."""
    library = place / "kill_at.so"
    command = [compiler(), "-shared", "-fPIC", "-O1", str(HERE / "kill_at.c"), "-o", str(library)]
    subprocess.run([*command, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "KILL_AT": str(library)}
    environment["OMP_NUM_THREADS"] = "1"
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            yield Runs(process)
        finally:
            process.stdin.close()


def _serve() -> None:
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import samfast.training.loop  # noqa: F401
    from samfast.integrations.torchvision import declare_missing_schemas

    declare_missing_schemas()
    import torchmetrics.classification  # noqa: F401

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        told = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(**told)
        _, status = os.waitpid(child, 0)
        with suppress(ProcessLookupError):  # its loaders would hold the folder's lock for seconds
            os.killpg(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(status), file=answers)


def _run(argv: list[str], folder: str, at: int | str, log: str | None) -> None:
    from samfast import cli

    os.setpgid(0, 0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(os.open(said(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    library = ctypes.CDLL(os.environ["KILL_AT"])
    number, part = (at, None) if isinstance(at, int) else (-1, at.encode())
    library.kill_at(folder.encode(), ctypes.c_long(number), part, log.encode() if log else None)
    code = 1
    try:
        code = cli.main(argv)
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
