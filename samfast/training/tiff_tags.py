# SPDX-License-Identifier: Apache-2.0
"""What a file's tags say its samples mean: which are colours, which is alpha, what is no data.

The one place where that is decided, for every depth, layout, codec and decoder. Nothing here opens
a file; the caller puts the file's name before each sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# PhotometricInterpretation
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, MASK, INKS, YCBCR = range(7)
_NAMES = {MASK: "transparency mask", 8: "CIELab", 32803: "colour filter array", 34892: "linear raw"}
ASSOCIATED, UNASSOCIATED = 1, 2  # of ExtraSamples: the two that are alpha
REDUCED, PAGE_MASK = 1, 4  # bits of NewSubfileType


@dataclass(frozen=True)
class Tags:
    """What a file says about its samples.

    samples: of each pixel   bits: of each sample   kind: "u", "i" or "f" (NumPy's letters)
    photometric: PhotometricInterpretation, None where it is missing
    extra: ExtraSamples, which is about the last samples
    no_data: the value that stands for no data   ink_set: 1 is CMYK
    """

    samples: int = 1
    bits: int = 8
    kind: str = "u"
    photometric: int | None = BLACK_IS_ZERO
    extra: tuple[int, ...] = ()
    no_data: float | None = None
    ink_set: int = 1

    @property
    def alpha(self) -> int | None:
        """The sample that is alpha: the first that ExtraSamples calls so."""
        first = self.samples - len(self.extra)
        found = [first + i for i, what in enumerate(self.extra) if what in (1, 2)]
        return found[0] if found else None

    @property
    def premultiplied(self) -> bool:
        """Whether the colours are multiplied by alpha already."""
        given = [what for what in self.extra if what in (ASSOCIATED, UNASSOCIATED)]
        return given[:1] == [ASSOCIATED]

    @property
    def top(self) -> int:
        """The largest value that an integer sample of so many bits holds."""
        return (1 << (self.bits - (self.kind == "i"))) - 1


@dataclass(frozen=True)
class Plan:
    """How samples become a picture.

    bands: the samples to show, from 0   colours: "grey", "rgb", "palette" or "cmyk"
    alpha: the sample that is alpha, None without   inverted: small values are bright
    direct: values are brightness as they are (8 bits or fewer, unsigned); else they are scaled
    """

    bands: tuple[int, ...]
    colours: str
    alpha: int | None
    premultiplied: bool
    inverted: bool
    direct: bool


def image_plan(tags: Tags, bands: Sequence[int] | None = None) -> Plan:
    """How an image with these tags is shown.

    bands: one or three numbers from 1 in place of what the tags say. Raises ValueError, a phrase
    that follows the file's name, where the tags do not say which bands to show.
    """
    _check_tags(tags)
    alpha, photometric = tags.alpha, tags.photometric
    if bands is not None:
        chosen, colours = _chosen(tags, bands), "rgb" if len(bands) == 3 else "grey"
        alpha = None if alpha in chosen else alpha
    elif photometric == RGB:
        chosen, colours = (0, 1, 2), "rgb"
    elif photometric == PALETTE:
        if tags.samples != 1 + (alpha is not None):
            raise ValueError(f"holds a palette and {tags.samples} samples; save it as RGB")
        chosen, colours = (0,), "palette"
    elif photometric == INKS:
        if tags.ink_set != 1 or tags.samples < 4 or tags.kind != "u" or tags.bits not in (8, 16):
            raise ValueError("holds inks that are not CMYK of 8 or 16 bits; save it as RGB")
        chosen, colours = (0, 1, 2, 3), "cmyk"
    elif photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO):
        chosen = tuple(i for i in range(tags.samples) if i != alpha)
        if len(chosen) not in (1, 3):
            raise ValueError(
                f"holds {len(chosen)} bands, and its tags do not say which of them to show; name "
                + ("one with --bands 1" if len(chosen) < 3 else "three with --bands 1,2,3")
            )
        colours = "rgb" if len(chosen) == 3 else "grey"
    else:
        raise ValueError(f"{_photometric_problem(photometric)}; save it as grey or RGB")
    return Plan(
        bands=chosen,
        colours=colours,
        alpha=alpha,
        premultiplied=alpha is not None and tags.premultiplied,
        inverted=photometric == WHITE_IS_ZERO,
        direct=tags.kind == "u" and tags.bits <= 8,
    )


def mask_bands(tags: Tags) -> tuple[int, ...]:
    """The samples of a mask that must hold the same values, from 0: one or three.

    All others must be constant. The values count as they are stored, whatever
    PhotometricInterpretation says of their brightness. Raises ValueError as ``image_plan`` does.
    """
    _check_tags(tags)
    if tags.photometric == RGB:
        return (0, 1, 2)
    if tags.photometric == INKS:
        raise ValueError("holds inks; save it with one channel")
    bands = tuple(i for i in range(tags.samples) if i != tags.alpha)
    if len(bands) not in (1, 3):
        raise ValueError(f"holds {len(bands)} bands; save it with one channel")
    return bands


def _check_tags(tags: Tags) -> None:
    """Raise ValueError if the numbers of samples contradict each other."""
    colours = {RGB: 3, YCBCR: 3, INKS: 1}.get(tags.photometric or 0, 1)
    if tags.samples - len(tags.extra) < colours:
        raise ValueError(
            f"holds {tags.samples} samples, of which ExtraSamples takes {len(tags.extra)}; "
            f"expected at least {colours} for the colours"
        )


def _chosen(tags: Tags, bands: Sequence[int]) -> tuple[int, ...]:
    if tags.photometric == PALETTE:
        raise ValueError("has a palette, whose colours are not bands; leave out --bands")
    if max(bands) > tags.samples:
        raise ValueError(
            f"holds {tags.samples} band{'s' if tags.samples > 1 else ''}, but --bands names band "
            f"{max(bands)}"
        )
    return tuple(band - 1 for band in bands)


def _photometric_problem(photometric: int | None) -> str:
    if photometric is None:
        return "has no PhotometricInterpretation, so that its values could be dark or bright"
    name = _NAMES.get(photometric, "unknown")
    return f"has PhotometricInterpretation {photometric} ({name}), which is not read"


def no_data_number(text: str) -> float | None:
    """The number in a GDAL_NODATA tag; None for an empty one. ValueError for anything else."""
    text = text.strip().strip("\0").strip()
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"has the GDAL_NODATA tag {text[:40]!r}, which is not a number; remove the tag"
        ) from None


def without_data(values: np.ndarray, no_data: float | None) -> np.ndarray:
    """Which values stand for no data: NaN, and what GDAL_NODATA names; bool, the shape of values.

    The tag's number is compared at the values' own precision. Huge numbers are often written with
    few digits, so that six of them are enough above 1e30.
    """
    floats = values.dtype.kind == "f"
    none = np.isnan(values) if floats else np.zeros(values.shape, bool)
    if no_data is None or np.isnan(no_data):
        return none
    if floats:
        with np.errstate(over="ignore"):
            none |= values == values.dtype.type(no_data)
        if abs(no_data) > 1e30 and np.isfinite(no_data):
            none |= np.isclose(values.astype(np.float64), no_data, rtol=1e-5, atol=0.0)
        return none
    limits = np.iinfo(values.dtype)
    if limits.min <= no_data <= limits.max and no_data == int(no_data):
        none |= values == values.dtype.type(int(no_data))
    return none


def full_pages(kinds: Sequence[int]) -> list[int]:
    """The pages of a file that are pictures of their own, by their NewSubfileType.

    Reduced copies and transparency masks belong to another page. Where all are such, all count.
    """
    full = [i for i, kind in enumerate(kinds) if not kind & (REDUCED | PAGE_MASK)]
    return full or list(range(len(kinds)))
