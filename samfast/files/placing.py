# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole: written under another name, brought to the disk, then renamed.

A kill, a power cut or a full disk leaves what was there before. An error names the file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from samfast.files.temporary import locked, remove_dead, temporary_file, temporary_folder

_PATIENCE = 60.0  # seconds to wait for another program that saves to the same folder


class NotWritten(OSError):
    """A file could not be written; what was there before still is."""

    def __init__(self, path: Path, error: OSError):
        super().__init__(error.errno, error.strerror or str(error), str(path))

    def __str__(self) -> str:
        return (
            f"{self.filename} could not be written ({self.strerror}); what was there before is kept"
        )


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an error of the file system say which file was to be written."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        raise NotWritten(path, error) from error


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put a file in place in one step: the old one stays until the new one is complete.

    durable: wait for the disk, so that a power cut changes nothing either
    """
    with whole_file(path, durable=durable) as (file, _):
        file.write(data)


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[tuple[BinaryIO, Path]]:
    """``write_whole`` of what the block writes: the open file, and where it is until the end.

    An error in the block leaves what was there before.
    """
    with named(path), temporary_file(path) as (file, place):
        yield file, place
        _finish(file, durable)
        os.replace(place, path)
        if durable:
            sync(path.parent)


def write_together(folder: Path, files: dict[str, bytes]) -> None:
    """Put files in a folder; a new folder appears in one step, with all of them.

    In a folder that is there they are replaced one after the other, once all are written; the last
    one is the commit. Programs that write to one folder take turns.
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
    """Raise ValueError where something is there. folder: it becomes a folder, and an empty one may
    be there."""
    empty = folder and output.is_dir() and not any(output.iterdir())
    if os.path.lexists(output) and not empty:
        raise ValueError(f"output {output} exists; name another file or folder, or remove it")


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
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
    if os.name != "posix":  # an open file cannot be renamed
        file.close()


def _placed_new(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether the new folder is in place; not if another program was faster."""
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
    """Wait until no other program writes to the folder, where the file system can tell."""
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
