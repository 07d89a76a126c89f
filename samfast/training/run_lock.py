# SPDX-License-Identifier: Apache-2.0
"""A lock on an output folder: one run at a time, released when the run ends."""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from samfast.files.placing import write_whole

LOCK = ".samfast.lock"
HOLDER = ".samfast.holder.json"  # of its own: some versions of filelock empty the lock's file
_GRACE = 15.0  # seconds in which the loaders of a killed run notice that it is gone


class RunLock:
    """Held by a run while it uses its folder."""

    def __init__(self, folder: Path):
        from filelock import FileLock

        self.folder = folder
        self.cut_short = False  # whether the run before came to no end
        self._lock = FileLock(str(folder / LOCK))

    def acquire(self) -> None:
        """Raise ValueError when another run has the folder."""
        from filelock import Timeout

        try:
            self._take(0.0)
        except Timeout:
            # Without a holder's file the other run has only just begun, or is about to end.
            if _is_gone(holder := _holder(self.folder)):
                self._wait(holder)
            else:
                raise self._refusal(holder) from None
        self.cut_short = was_cut_short(self.folder)
        own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        write_whole(self.folder / HOLDER, json.dumps(own).encode(), durable=False)

    def release(self) -> None:
        """Let others have the folder; removes the lock's files."""
        for name in (HOLDER, LOCK):
            with suppress(OSError):  # Windows keeps a file that is open
                (self.folder / name).unlink(missing_ok=True)
        self._lock.release()

    def _take(self, seconds: float) -> None:
        """Lock the file that has the name; a run that ends removes the one that it had."""
        while True:
            with open(self.folder / LOCK, "ab") as file:
                self._lock.acquire(timeout=seconds)
                with suppress(FileNotFoundError):
                    named = (self.folder / LOCK).stat()
                    if os.path.samestat(os.fstat(file.fileno()), named):
                        return
                self._lock.release()

    def _wait(self, holder: dict[str, Any]) -> None:
        from filelock import Timeout

        try:
            self._take(_GRACE)
        except Timeout:
            raise self._refusal(holder) from None

    def _refusal(self, holder: dict[str, Any]) -> ValueError:
        who = "another run"
        if holder:
            who = f"process {holder['pid']} on {holder['host']}, started at {holder['since']}"
        return ValueError(
            f"output folder {self.folder} is in use by {who}; choose another --output, or wait "
            "until that run ends"
        )


def was_cut_short(folder: Path) -> bool:
    """Whether a run used the folder and did not come to its end, or still uses it."""
    return (folder / HOLDER).is_file()


def _holder(folder: Path) -> dict[str, Any]:
    """Process, host and time of the run that has the folder; {} when it does not say."""
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    keys = ("pid", "host", "since")
    whole = isinstance(found, dict) and all(key in found for key in keys)
    return found if whole and isinstance(found["pid"], int) else {}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    here = os.name == "posix" and holder.get("host") == socket.gethostname()
    if not here or holder["pid"] <= 0:
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
