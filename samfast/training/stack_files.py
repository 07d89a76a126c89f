# SPDX-License-Identifier: Apache-2.0
"""Results as TIFF files: one of each image, and of a stack one with a page for each slice."""

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from samfast.files.placing import named, whole_file
from samfast.training.georeference import Georeference
from samfast.training.label_tiff import Pages, is_big
from samfast.training.stacks import Slice, Source
from samfast.training.tiff_pages import read_pages
from samfast.training.tiff_samples import stored_samples


class Name(NamedTuple):
    """What an image's results are called.

    file: those of the whole file   image: those of the image, which may be a slice of it
    """

    file: str
    image: str


class _Unfinished(Exception):
    """Stops a file that has not all its pages."""


class StackFiles:
    """TIFF files that appear once they have all their pages; a context, at whose end they must.

    counts: how many slices each stack has, which come in their order
    """

    def __init__(self, counts: Mapping[Path, int]):
        self._counts = counts
        self._growing: dict[Path, _Growing] = {}

    def __enter__(self) -> "StackFiles":
        return self

    def __exit__(self, *error: object) -> None:
        for growing in self._growing.values():
            growing.give_up()
        self._growing.clear()

    def add(
        self, path: Path, source: Source, values: np.ndarray, place: Georeference | None = None
    ) -> None:
        """Write an image's page, or a slice's to those before it.

        path: of the file, the same for all slices of a stack   values: (H, W), see ``Pages``
        """
        if not isinstance(source, Slice):
            write_pages(path, values[None], [place])
            return
        count = self._counts[source.file]
        if source.index == 0:
            self._growing[path] = _Growing(path, is_big(count * values.size))
        self._growing[path].add(values, place)
        if source.index == count - 1:
            self._growing.pop(path).finish()


def write_pages(path: Path, values: np.ndarray, places: Sequence[Georeference | None]) -> None:
    """values (pages, H, W) as a TIFF file, with the georeference of each page."""
    with whole_file(path, durable=False) as (file, _):
        pages = Pages(file, is_big(values.size))
        for page, place in zip(values, places, strict=True):
            pages.add(page, place)


class _Growing:
    """A file that gets one page after the other, all of the type that the widest of them needs."""

    def __init__(self, path: Path, big: bool):
        self.path, self.big = path, big
        self._open = ExitStack()
        self._file, self._at = self._open.enter_context(whole_file(path, durable=False))
        self._pages = Pages(self._file, big)
        self._dtype: np.dtype | None = None
        self._places: list[Georeference | None] = []

    def add(self, values: np.ndarray, place: Georeference | None) -> None:
        dtype = self._dtype or values.dtype
        with named(self.path):
            if values.dtype.itemsize > dtype.itemsize:
                self._widen(values.dtype)
                dtype = values.dtype
            self._pages.add(values.astype(dtype, copy=False), place)
        self._dtype = dtype
        self._places.append(place)

    def _widen(self, dtype: np.dtype) -> None:
        """Write the pages so far anew, as another type."""
        self._file.flush()
        with self._at.open("rb") as file:
            pages = read_pages(file)
        wide = io.BytesIO()
        again = Pages(wide, self.big)
        for i, place in enumerate(self._places):
            again.add(stored_samples(self._at, pages, i, None)[..., 0].astype(dtype), place)
        self._file.seek(0)
        self._file.truncate()
        self._file.write(wide.getbuffer())
        again.file, self._pages = self._file, again

    def finish(self) -> None:
        self._open.close()

    def give_up(self) -> None:
        with suppress(_Unfinished):
            self._open.__exit__(_Unfinished, _Unfinished(), None)
