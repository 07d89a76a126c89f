# SPDX-License-Identifier: Apache-2.0
"""Write files whole: under another name, flushed to the disk, then renamed.

A kill, a power cut or a full disk leaves the old file in place. An error names the file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from samfast.files.temporary import locked, remove_dead, temporary_file, temporary_folder

_PATIENCE = 60.0  # seconds to wait for another program that saves to the same folder


class NotWritten(OSError):
    """A file could not be written; the old one is still there."""

    def __init__(self, path: Path, error: OSError):
        super().__init__(error.errno, error.strerror or str(error), str(path))

    def __str__(self) -> str:
        return f"{self.filename} could not be written ({self.strerror}); the old content is kept"


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Make an error of the file system name the file that was to be written."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        raise NotWritten(path, error) from error


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file in one step: the old one stays until the new one is complete.

    durable: wait for the disk, so that a power cut changes nothing either
    """
    with whole_file(path, durable=durable) as (file, _):
        file.write(data)


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[tuple[BinaryIO, Path]]:
    """Yield an open file and its temporary path; put it in place when the block ends.

    An error in the block leaves the old file in place.
    """
    with named(path), temporary_file(path) as (file, place):
        yield file, place
        _finish(file, durable)
        os.replace(place, path)
        if durable:
            sync(path.parent)


def write_together(folder: Path, files: dict[str, bytes]) -> None:
    """Put files in a folder; a new folder appears in one step, with all of them.

    In an existing folder, files are replaced one by one after all are written; the last one is the
    commit. Programs that write to the same folder take turns.
    """
    with named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(folder) and _placed_new(folder, files):
            return
        folder.mkdir(exist_ok=True)
    with _turn(folder):
        with named(folder):
            remove_dead(folder, files)
        _replace(folder, list(files.items()), [])
        with named(folder):
            sync(folder)


def refuse_existing(output: Path, *, folder: bool) -> None:
    """Raise ValueError if the output exists. folder: allow an empty folder."""
    empty = folder and output.is_dir() and not any(output.iterdir())
    if os.path.lexists(output) and not empty:
        raise ValueError(f"output {output} exists; name another file or folder, or remove it")


def sync(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finish(file: IO[bytes], durable: bool) -> None:
    file.flush()
    if durable:
        os.fsync(file.fileno())
    if os.name != "posix":  # other systems cannot rename an open file
        file.close()


def _placed_new(folder: Path, files: dict[str, bytes]) -> bool:
    """Put the new folder in place; return False if another program was faster."""
    remove_dead(folder.parent, {folder.name})
    with temporary_folder(folder) as place:
        for name, data in files.items():
            with named(folder / name), open(place / name, "wb") as file:
                file.write(data)
                _finish(file, durable=True)
        sync(place)
        try:
            os.rename(place, folder)
        except OSError:
            if folder.is_dir():
                return False
            raise
        sync(folder.parent)
    return True


def _replace(folder: Path, rest: list[tuple[str, bytes]], written: list[tuple[Path, Path]]) -> None:
    """Write all of ``rest``, then rename all in order; written: (where it is, where it belongs)."""
    if not rest:
        for place, path in written:
            with named(path):
                os.replace(place, path)
        return
    (name, data), *rest = rest
    path = folder / name
    with named(path), temporary_file(path) as (file, place):
        file.write(data)
        _finish(file, durable=True)
        _replace(folder, rest, [*written, (place, path)])


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait until no other program writes to the folder, if the file system can tell."""
    if os.name != "posix":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if locked(handle, _PATIENCE) is False:
            raise TimeoutError(
                f"another program has been writing to {folder} for {_PATIENCE:g} seconds; save to "
                "another folder"
            )
        yield
    finally:
        os.close(handle)
