# SPDX-License-Identifier: Apache-2.0
"""Temporary files and folders, of which the dead can be told from the living.

A program holds a lock on each one that it writes. The lock ends with the program, however that
ends, so that the next program removes what is left of it and nothing else.
"""

import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be renamed either
    fcntl = None  # type: ignore[assignment]  # Windows does not have it

_NAME = re.compile(r"\.(?P<of>.+)\.\d+(-[0-9a-f]{8})?\.tmp")
_OLD = 24 * 3600  # seconds after which one is dead where nothing can be locked


def locked(handle: int, seconds: float = 0.0) -> bool | None:
    """Lock a file or folder until it is closed; False when another program has the lock.

    seconds: how long to wait for it   None: this file system has no locks
    """
    if fcntl is None:
        return None
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        except OSError:
            return None


@contextmanager
def temporary_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file next to ``path``, and where it is; removed at the end unless it was renamed."""
    while True:
        place = _place(path)
        file = open(place, "xb")  # noqa: SIM115
        if locked(file.fileno()) is not False and place.exists():
            break
        file.close()  # another program took it for a dead one
    try:
        yield file, place
    finally:
        if fcntl is None:
            _closed(file)
        place.unlink(missing_ok=True)
        _closed(file)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """The same for a folder."""
    while True:
        place = _place(path)
        place.mkdir()
        handle = os.open(place, os.O_RDONLY) if fcntl is not None else None
        if handle is None or (locked(handle) is not False and place.exists()):
            break
        os.close(handle)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_dead(folder: Path, of: Collection[str] | None = None) -> None:
    """Remove what programs that were killed left in a folder.

    of: only what was on its way to these names
    """
    for entry in list(folder.iterdir()):
        found = _NAME.fullmatch(entry.name)
        if found is None or (of is not None and found["of"] not in of):
            continue
        with suppress(OSError):  # gone meanwhile, or another user's
            _remove_if_dead(entry)


def _closed(file: BinaryIO) -> None:
    with suppress(OSError):  # bytes in its buffer that a full disk did not take
        file.close()


def _place(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _remove_if_dead(entry: Path) -> None:
    about = entry.lstat()
    folder = stat.S_ISDIR(about.st_mode)
    if not folder and not stat.S_ISREG(about.st_mode):
        return
    handle = None if fcntl is None else os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        mine = None if handle is None else locked(handle)
        if mine is None:
            mine = time.time() - about.st_mtime > _OLD
        if mine and folder:
            shutil.rmtree(entry, ignore_errors=True)
        elif mine:
            entry.unlink(missing_ok=True)
    finally:
        if handle is not None:
            os.close(handle)
