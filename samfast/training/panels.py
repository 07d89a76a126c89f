# SPDX-License-Identifier: Apache-2.0
"""Pictures side by side under a title and headers, above a legend."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEADERS = ("image", "truth", "prediction")
_GAP = 4  # pixels between pictures
_SMALLEST, _LARGEST = 12, 64  # pixels; a letter is a 32nd of the picture within these
_BAR = 6  # times as wide as it is high


class Mark(NamedTuple):
    """An entry of a legend: colours uint8 (n, 3) from left to right (or none), and a text."""

    colours: np.ndarray
    text: str


def titled(title: str, images: Sequence[np.ndarray], legend: Sequence[Mark] = ()) -> Image.Image:
    """The pictures with HEADERS above them, each with its own pixels.

    Around narrow pictures the canvas grows until every text fits.

    images: uint8 (H, W, 3), as many as HEADERS
    """
    height = images[0].shape[0]
    size = min(_LARGEST, max(_SMALLEST, round(max(images[0].shape) / 32)))
    font = _font(size)
    ascent, descent = font.getmetrics()
    line, margin = ascent + descent + size // 4, size // 2
    title = printable(title)
    widths = [
        max(image.shape[1], _length(font, header) + size // 2)
        for image, header in zip(images, HEADERS, strict=True)
    ]
    entries = [(mark, printable(mark.text)) for mark in legend]
    sizes = [_mark_width(mark, size) + _length(font, text) for mark, text in entries]
    inner = max(sum(widths) + _GAP * (len(widths) - 1), _length(font, title), *sizes, 0)
    places = _flowed(sizes, inner, size)
    lines = 1 + places[-1][1] if places else 0
    total = 2 * line + height + (margin // 2 + lines * line if lines else 0)
    canvas = Image.new("RGB", (inner + 2 * margin, total + 2 * margin), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), title, "black", font)
    x, y = margin, margin + line
    for image, header, width in zip(images, HEADERS, widths, strict=True):
        draw.text((x, y), header, "dimgrey", font)
        canvas.paste(Image.fromarray(image), (x, y + line))
        x += width + _GAP
    y += line + height + margin // 2
    for (mark, text), (left, number) in zip(entries, places, strict=True):
        x, top = margin + left, y + number * line
        wide = _mark_width(mark, size)
        if wide:
            picture = Image.fromarray(mark.colours[None]).resize((wide - size // 2, size))
            canvas.paste(picture, (x, top + (ascent + descent - size) // 2))
        draw.text((x + wide, top), text, "black", font)
    return canvas


def printable(text: str) -> str:
    """The text with escapes for what cannot be drawn: line ends, bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _mark_width(mark: Mark, size: int) -> int:
    return (0, size + size // 2, _BAR * size + size // 2)[min(2, len(mark.colours))]


def _flowed(widths: Iterable[int], room: int, gap: int) -> list[tuple[int, int]]:
    """(left, line) of each entry, as many in a line as fit."""
    places, x, line = [], 0, 0
    for width in widths:
        if x > 0 and x + width > room:
            x, line = 0, line + 1
        places.append((x, line))
        x += width + gap
    return places


def _length(font: ImageFont.FreeTypeFont, text: str) -> int:
    return int(np.ceil(font.getlength(text)))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; it has a box for a letter that it lacks."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
