# SPDX-License-Identifier: Apache-2.0
"""The position of an image on earth, from the tags of its GeoTIFF."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from samfast.training.stacks import Source, file_of, index_of, source_of
from samfast.training.tiff_pages import ORIENTATION, SIGNATURES, Page, read_pages
from samfast.training.tiff_tags import full_pages

SCALE, TIE_POINTS, MATRIX, KEYS, DOUBLES, TEXTS = 33550, 33922, 34264, 34735, 34736, 34737
TAGS = (SCALE, TIE_POINTS, MATRIX, KEYS, DOUBLES, TEXTS)
_RASTER, _GEOGRAPHIC, _PROJECTED = 1025, 2048, 3072  # keys of the directory KEYS
_POINT = 2  # of _RASTER: positions are centres of pixels
_USER_DEFINED = 32767

Affine = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Georeference:
    """affine: (a, b, c, d, e, f) of X = a·x + b·y + c, Y = d·x + e·y + f, where x, y are in pixels
    from the outer corner of the first pixel; None if the tags do not say
    epsg: the coordinate system's number, None where it has none
    tags: by number, as they are stored: texts as bytes, else integers or floats
    """

    affine: Affine | None
    epsg: int | None = None
    tags: dict[int, tuple | bytes] = field(default_factory=dict)


def read_georeference(path: Source | str) -> Georeference | None:
    """Read the georeference of a TIFF file or of a slice of it; None if there is none.

    Raises ValueError if its tags are damaged, or if its orientation turns the image, so that the
    tags do not fit the upright image.
    """
    path = source_of(path)
    file_path = file_of(path)
    if not file_path.exists():
        raise FileNotFoundError(f"{file_path} does not exist")
    try:
        if not file_path.is_file():
            raise ValueError("it is not a regular file")
        with file_path.open("rb") as file:
            if file.read(4) not in SIGNATURES:
                return None
            pages = read_pages(file, also=TAGS)
        full = full_pages([page.kind for page in pages])
        page = pages[full[index_of(path) or 0]]
        if not any(tag in page.tags for tag in (SCALE, TIE_POINTS, MATRIX, KEYS)):
            return None
        if page.number(ORIENTATION, 1) != 1:
            raise ValueError("its Orientation tag turns the image; save it upright")
        return _read(page)
    except (ValueError, OSError) as error:
        raise ValueError(f"the georeference of {path} cannot be read: {error}") from None


def _read(page: Page) -> Georeference:
    for tag in TAGS:
        if isinstance(page.tags.get(tag, b"" if tag == TEXTS else ()), bytes) != (tag == TEXTS):
            raise ValueError(f"its tag {tag} does not have GeoTIFF's type")
    keys = _keys(page.numbers(KEYS)) if KEYS in page.tags else {}
    affine = _affine(page)
    if affine is not None:
        _check_affine(affine)
    if affine is not None and keys.get(_RASTER) == _POINT:
        a, b, c, d, e, f = affine
        affine = a, b, c - (a + b) / 2, d, e, f - (d + e) / 2
    epsg = keys.get(_PROJECTED) or keys.get(_GEOGRAPHIC)
    tags = {tag: page.tags[tag] for tag in TAGS if tag in page.tags}
    return Georeference(affine, None if epsg == _USER_DEFINED else epsg, tags)


def _keys(numbers: tuple[int, ...]) -> dict[int, int]:
    """The keys whose value is in the directory itself."""
    if len(numbers) < 4 or len(numbers) < 4 + 4 * numbers[3]:
        raise ValueError("its directory of keys is truncated")
    if any(not isinstance(number, int) or number >= 2**16 for number in numbers):
        raise ValueError("its directory of keys holds numbers that do not fit 16 bits")
    entries = (numbers[4 * i : 4 * i + 4] for i in range(1, 1 + numbers[3]))
    return {key: value for key, place, _, value in entries if place == 0}


def _check_affine(affine: Affine) -> None:
    a, b, _, d, e, _ = affine
    if not all(map(isfinite, affine)) or a * e == b * d:
        raise ValueError(f"its affine map is singular: {affine}")


def _affine(page: Page) -> Affine | None:
    if MATRIX in page.tags:
        m = page.numbers(MATRIX)
        if len(m) != 16:
            raise ValueError(f"its matrix has {len(m)} numbers; expected 16")
        a, b, c, d, e, f = (float(m[i]) for i in (0, 1, 3, 4, 5, 7))
        return a, b, c, d, e, f
    scale, ties = page.numbers(SCALE), page.numbers(TIE_POINTS)
    if not scale or len(ties) != 6:  # many tie points do not make an affine map
        return None
    if len(scale) < 2:
        raise ValueError(f"its scale has {len(scale)} number; expected 3")
    column, row, _, x, y, _ = ties
    width, height = float(scale[0]), float(scale[1])
    return width, 0.0, x - column * width, 0.0, -height, y + row * height
