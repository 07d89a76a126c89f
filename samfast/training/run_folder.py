# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run: checked, locked, tried out and claimed before the model is built.

settings.json       what the run was told
adapter/last, best  the adapters of the last epoch and of the best one, each a folder that is whole
metrics.csv, curves.png, tensorboard/    after each epoch
overlays/, scores.csv, classes.csv (of classes)    of the best epoch
state/              from which the run goes on after a kill (see ``states``)
summary.json        at the end

While it runs there are the files of its lock (see ``run_lock``). An earlier run's results stay
until the first result of the one that replaces them: its settings are in settings.next.json till
then, and the old results are in .earlier/ while the new ones are written. A folder without a state,
``adapter/last`` and ``adapter/best`` holds no result.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from samfast.files.format import TENSORS
from samfast.files.placing import write_whole
from samfast.files.temporary import remove_dead
from samfast.training.run_lock import HOLDER, LOCK, RunLock, was_cut_short

STATES = "state"
FOLDERS = ("adapter", STATES, "overlays", "tensorboard")
FILES = (
    "metrics.csv",
    "curves.png",
    "settings.json",
    "summary.json",
    "scores.csv",
    "classes.csv",
)
SETTINGS = "settings.json"
_NEXT = "settings.next.json"
_EARLIER = ".earlier"
_ROOM = ".room."
_COPIES = 3  # last, best, and one that is being written
_STATE = 3  # times an adapter: it, and its two moments in the optimizer
_DECODER = 13 * 2**20  # bytes of a trained mask decoder, which every run saves
_MIB = 2**20


def clear_results(folder: Path) -> None:
    """Remove an earlier run's results from a folder, and nothing else that may be in it."""
    for name in FOLDERS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def files_of_run(size: int, keep: int) -> list[int]:
    """Bytes of the largest files that a run has at once. size: of an adapter   keep: states"""
    states = keep + 1 if keep else 0
    return [size] * _COPIES + [_STATE * size] * states


def check_folder(output: Path) -> None:
    """Raise ValueError if something else is than a folder; changes nothing."""
    if output.is_dir():
        return
    if output.exists():
        raise ValueError(f"output {output} is a file, not a folder")
    if output.is_symlink():
        raise ValueError(f"output {output} is a symbolic link to nothing; remove it")


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if a run cannot write to a folder that is as it is; changes nothing."""
    check_folder(folder)
    if not overwrite and holds_something(folder):
        raise _not_empty(folder)


def holds_something(folder: Path) -> bool:
    """Whether there is more in a folder than what a run that is at work or was killed leaves."""
    if not folder.is_dir() or was_cut_short(folder):  # then the lock says more
        return False
    names = {entry.name for entry in folder.iterdir()} - {LOCK, HOLDER}
    return any(not name.startswith(f".{HOLDER}.") for name in names)


def has_result(folder: Path) -> bool:
    """Whether a run has saved an adapter or a state in the folder."""
    adapters = any((folder / "adapter" / name / TENSORS).is_file() for name in ("last", "best"))
    return adapters or has_states(folder)


def has_states(folder: Path) -> bool:
    """Whether a run's folder has a state; reads none."""
    return any(folder.glob(f"{STATES}/[!.]*/{TENSORS}"))


class ClaimedFolder:
    """An output folder that one run has for itself, from ``open`` to ``close``.

    resume: whether the run may go on with what is there   keep: how many states it keeps
    """

    def __init__(self, folder: Path, overwrite: bool, resume: bool = False, keep: int = 0):
        self.folder = folder
        self.overwrite = overwrite
        self.resume = resume
        self.keep_states = keep
        self.begun = False
        self._settings: str | None = None  # the file that has them
        self._made: list[Path] = []  # folders, the outermost first
        self._lock: RunLock | None = None

    def open(self, settings: bytes, decoders: int = 1) -> None:
        """Make, lock and try out the folder, and write the settings.

        decoders: how many the run trains. Raises ValueError when another run has the folder, it is
        not empty, it cannot be written or is too small, and then leaves nothing behind.
        """
        try:
            with self._reported():
                self._make()
                lock = RunLock(self.folder)
                lock.acquire()
                self._lock = lock
                self._tidy(lock.cut_short)
                self._check_empty()
                self.begun = self.resume and has_states(self.folder)
                self.check_room(decoders * _DECODER)
                if self.begun:
                    return
                earlier = any((self.folder / name).exists() for name in (*FOLDERS, *FILES))
                self._settings = _NEXT if earlier else SETTINGS
                write_whole(self.folder / self._settings, settings)
        except BaseException:
            self.close()
            raise

    def check_room(self, size: int) -> None:
        """Raise ValueError when adapters of so many bytes do not fit into the folder."""
        states = self.keep_states + 1 if self.keep_states else 0
        sizes = files_of_run(size, self.keep_states)
        if self.begun:  # what it goes on with is there already
            sizes = [size] + [_STATE * size] * min(1, states)
        places = [self.folder / f"{_ROOM}{i}" for i in range(len(sizes))]
        free = shutil.disk_usage(self.folder).free
        try:
            for place, wanted in zip(places, sizes, strict=True):
                with open(place, "wb") as file:
                    _reserve(file.fileno(), wanted, self.folder, sum(sizes))
        except OSError as error:
            raise ValueError(
                f"output folder {self.folder} has too little space for a run: expected "
                f"{sum(sizes) / _MIB:.1f} MiB, got {free / _MIB:.1f} MiB ({error.strerror}); "
                f"choose another --output{', or --keep 0' if states else ''}"
            ) from None
        finally:
            for place in places:
                place.unlink(missing_ok=True)

    def begin(self) -> None:
        """Make way for the first result."""
        if self.begun:
            return
        self.begun = True
        if self._settings == _NEXT:
            (self.folder / _EARLIER).mkdir(exist_ok=True)
            for name in (*FOLDERS, *FILES):
                if (self.folder / name).exists():
                    os.rename(self.folder / name, self.folder / _EARLIER / name)
            os.replace(self.folder / _NEXT, self.folder / SETTINGS)
        (self.folder / "adapter").mkdir(exist_ok=True)

    def keep(self) -> None:
        """Forget what an earlier run left: the new results are there."""
        shutil.rmtree(self.folder / _EARLIER, ignore_errors=True)

    def close(self) -> None:
        """Let others have the folder. Without a result it is as it was before ``open``."""
        if self._lock is not None:
            try:
                if not self.begun and self._settings is not None:
                    (self.folder / self._settings).unlink(missing_ok=True)
                elif self.begun and not has_result(self.folder):
                    clear_results(self.folder)
                    self._restore()
            finally:
                self._lock.release()
                self._lock = None
        for made in reversed(self._made):
            with suppress(OSError):  # not empty
                made.rmdir()
        self._made = []

    def _make(self) -> None:
        missing = [f for f in (self.folder, *self.folder.parents) if not f.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"output folder {self.folder} cannot be written ({error.strerror}); choose another "
                "--output"
            ) from None

    def _tidy(self, cut_short: bool) -> None:
        """Put right what a run left that was killed."""
        if (self.folder / _EARLIER).is_dir():
            new = has_result(self.folder) and not (self.folder / _NEXT).exists()
            self.keep() if new else self._restore()
        (self.folder / _NEXT).unlink(missing_ok=True)
        if cut_short:
            for place in self.folder.glob(f"{_ROOM}[0-9]*"):
                place.unlink()
        if cut_short and not has_result(self.folder):
            clear_results(self.folder)
        for place in (self.folder, *(self.folder / name for name in FOLDERS)):
            if place.is_dir():
                remove_dead(place)

    def _check_empty(self) -> None:
        others = {entry.name for entry in self.folder.iterdir()} - {LOCK, HOLDER}
        going_on = self.resume and has_states(self.folder)
        if others and not self.overwrite and not going_on:
            raise _not_empty(self.folder)

    def _restore(self) -> None:
        """Put the earlier results back; while _NEXT is there, this is not done yet."""
        earlier = self.folder / _EARLIER
        if not earlier.is_dir():
            return
        (self.folder / _NEXT).touch()
        for name in (*FOLDERS, *FILES):
            if (earlier / name).exists():
                place = self.folder / name
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
                os.rename(earlier / name, place)
        earlier.rmdir()
        (self.folder / _NEXT).unlink()


def _reserve(handle: int, size: int, folder: Path, total: int) -> None:
    """Take space for a file; OSError when there is none for all of them."""
    if hasattr(os, "posix_fallocate"):
        with _as_unknown():
            return os.posix_fallocate(handle, 0, size)
    os.write(handle, b"0" * 4096)
    if shutil.disk_usage(folder).free < total:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _as_unknown() -> Iterator[None]:
    """Go on where a file system cannot take space beforehand."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _not_empty(folder: Path) -> ValueError:
    resume = "--resume to continue its run, " if has_states(folder) else ""
    return ValueError(
        f"output folder {folder} is not empty; choose another --output, {resume}or --overwrite to "
        "replace an earlier run's results"
    )
