# SPDX-License-Identifier: Apache-2.0
"""Decoded images and masks on disk, so that tiles are read without decoding files again.

Each array is a memory-mapped .npy file, so a tile uses only the memory of its own rows. A missing
file is made on demand, by any process that shares the folder.
"""

import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from samfast.files.temporary import temporary_folder
from samfast.training.stacks import Source

_MIB = 2**20


class Decoded:
    """Arrays of files by name, in a folder.

    most: how many files' arrays are kept, those that were asked for last; None: all
    """

    def __init__(self, folder: Path, most: int | None = None):
        self.folder = folder
        self.most = most
        self._recent: OrderedDict[str, None] = OrderedDict()

    def array(self, of: Source, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the array of a file, memory-mapped and read-only.

        make: called if it is missing
        Raises ValueError if the disk is full.
        """
        self._use(str(of))
        place = self.folder / f"{_digest(str(of))}-{_digest(name)}.npy"
        if not place.exists():
            self._save(place, make())
        return np.load(place, mmap_mode="r")

    def _save(self, place: Path, values: np.ndarray) -> None:
        free = shutil.disk_usage(self.folder).free
        if values.nbytes > free:
            raise ValueError(
                f"{self.folder.parent} has no room for the decoded images of tiles: "
                f"{values.nbytes / _MIB:.1f} MiB are needed and {free / _MIB:.1f} MiB are free; "
                "make room, or choose another place: --output of finetune, TMPDIR of evaluate"
            )
        new = place.with_suffix(f".{secrets.token_hex(4)}")
        with open(new, "wb") as file:
            np.save(file, values)
        os.replace(new, place)

    def _use(self, of: str) -> None:
        if self.most is None:
            return
        self._recent[of] = None
        self._recent.move_to_end(of)
        while len(self._recent) > self.most:
            oldest, _ = self._recent.popitem(last=False)
            for place in self.folder.glob(f"{_digest(oldest)}-*"):
                place.unlink()


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


@contextmanager
def decoded_files(output: Path, processes: int, first: bool) -> Iterator[Decoded]:
    """Arrays next to a run's results while it runs, shared by the processes that see the folder.

    first: whether this process makes the folder, of all that train together
    """
    if processes == 1:
        with temporary_folder(output / "decoded") as folder:
            yield Decoded(folder)
        return
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if first:
        with temporary_folder(output / "decoded") as folder:
            broadcast_object_list([str(folder.resolve())])
            yield Decoded(folder)
            PartialState().wait_for_everyone()
        return
    told: list[str | None] = [None]
    broadcast_object_list(told)
    assert told[0] is not None, told  # the first process has said where
    folder = Path(told[0])
    if folder.is_dir():
        yield Decoded(folder)
    else:  # on another machine
        with TemporaryDirectory(prefix="samfast-") as own:
            yield Decoded(Path(own))
    PartialState().wait_for_everyone()
