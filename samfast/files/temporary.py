# SPDX-License-Identifier: Apache-2.0
"""Temporary files and folders that a later program can recognise as abandoned.

A program holds a lock on each one that it writes. The lock ends with the program, however that
ends. The next program can thus remove abandoned files and nothing else.
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
except ImportError:  # Windows, which cannot rename an open file either
    fcntl = None  # type: ignore[assignment]  # Windows does not have it

_NAME = re.compile(r"\.(?P<of>.+)\.\d+(-[0-9a-f]{8})?\.tmp")
_OLD = 24 * 3600  # seconds until one counts as abandoned, if nothing can be locked


def locked(handle: int, seconds: float = 0.0) -> bool | None:
    """Lock a file or folder until it is closed; return False if another program has the lock.

    seconds: how long to wait for it. Returns None if this file system has no locks.
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
    """Yield a new file next to ``path``, and its path; remove it at the end unless renamed."""
    while True:
        place = _place(path)
        file = open(place, "xb")  # noqa: SIM115
        if locked(file.fileno()) is not False and place.exists():
            break
        file.close()  # another program took it for an abandoned one
    try:
        yield file, place
    finally:
        if fcntl is None:
            _closed(file)
        place.unlink(missing_ok=True)
        _closed(file)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to ``path``; remove it at the end unless renamed."""
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
    """Remove what killed programs left in a folder.

    of: remove only files that were to get these names
    """
    for entry in list(folder.iterdir()):
        found = _NAME.fullmatch(entry.name)
        if found is None or (of is not None and found["of"] not in of):
            continue
        with suppress(OSError):  # removed meanwhile, or owned by another user
            _remove_if_dead(entry)


def _closed(file: BinaryIO) -> None:
    with suppress(OSError):  # a full disk did not take the buffered bytes
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
