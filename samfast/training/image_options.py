# SPDX-License-Identifier: Apache-2.0
"""Options of the command line for reading image files."""

from dataclasses import dataclass
from math import isfinite
from typing import Any

RANGES = ("auto", "full")


@dataclass(frozen=True)
class ImageOptions:
    """bands: the file's bands that are shown, one or three numbers from 1; None: as its tags say

    range: which values of files with more than 8 bits become black and white: "auto" (the 1st and
    99th percentiles of the image's values), "full" (the number type's range) or two values
    """

    bands: tuple[int, ...] | None = None
    range: str | tuple[float, float] = "auto"

    def config(self) -> dict[str, Any]:
        """The options as the JSON values that ``from_config`` takes."""
        text = self.range if isinstance(self.range, str) else "{!r},{!r}".format(*self.range)
        bands = None if self.bands is None else ",".join(map(str, self.bands))
        return {"bands": bands, "range": text}


def image_options(bands: str | None = None, range: str | None = None) -> ImageOptions:
    """The options that texts of the command line name; ValueError for one that names none.

    bands: "2" or "1,2,3"   range: "auto", "full" or "LOW,HIGH"
    """
    return ImageOptions(_parsed_bands(bands), _parsed_range(range or RANGES[0]))


def remembered_options(
    record: dict[str, Any], bands: str | None = None, range: str | None = None
) -> ImageOptions:
    """The options an adapter was trained with, or those given in their place.

    record: the adapter's extra values; adapters of samfast 0.1.0 have none of these
    """
    kept = (bands or record.get("bands"), range or record.get("range"))
    for value in kept:
        if not isinstance(value, str | None):
            raise ValueError(f"the adapter's image options hold {value!r}; expected text")
    return image_options(*kept)


def _parsed_bands(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise ValueError(
            f"bands is {text!r}; expected one or three numbers from 1, such as 2 or 1,2,3"
        )
    return tuple(map(int, parts))


def _parsed_range(text: str) -> str | tuple[float, float]:
    if text in RANGES:
        return text
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not (low < high and isfinite(high - low)):
        raise ValueError(
            f"range is {text!r}; expected auto, full or LOW,HIGH with LOW below HIGH, such as "
            "0,4095"
        )
    return low, high
