# SPDX-License-Identifier: Apache-2.0
"""Small TIFF pictures of every meaning, and what each must look like, in exact fractions.

``python tests/training/tiff_cases.py`` writes ``tests/golden/tiff_pictures.npz``: the looks of all
cases. They are derived here from the specification's words, with Python's integers and fractions,
and share no code with samfast.
"""

from fractions import Fraction
from math import floor, isnan, nan
from pathlib import Path
from typing import NamedTuple

GOLDEN = Path(__file__).parents[1] / "golden" / "tiff_pictures.npz"
HEIGHT, WIDTH = 3, 5
COLOURS = 16  # of the palettes, whose indices have 4 or 8 bits


class Depth(NamedTuple):
    """bits, kind: of each sample   no_data: the value that a tag may name, and the tag's text
    value: of the number 0 to 96 that stands for brightness
    """

    bits: int
    kind: str
    no_data: float | None
    text: str
    value: object


DEPTHS = {
    "u1": Depth(1, "u", None, "", lambda n: n % 2),
    "u4": Depth(4, "u", 15, "15", lambda n: n % 15),
    "u8": Depth(8, "u", 255, "255", lambda n: 2 * n + 3),
    "u12": Depth(12, "u", 4095, "4095", lambda n: 40 * n),
    "u16": Depth(16, "u", 65535, " 65535 ", lambda n: 300 + 50 * n),
    "u32": Depth(32, "u", 0, "0", lambda n: 2**31 - 4000 + 100 * n),
    "i8": Depth(8, "i", -128, "-128", lambda n: n - 50),
    "i16": Depth(16, "i", -9999, "-9999", lambda n: 100 * n - 4000),
    "i32": Depth(32, "i", -(2**31), "-2147483648", lambda n: (n - 40) * 10**6),
    "f16": Depth(16, "f", -1000.0, "-1e3", lambda n: (n - 30) / 8),
    "f32": Depth(32, "f", -9999.0, "-9999", lambda n: (n - 30) / 8),
    "f64": Depth(64, "f", -1.7976931348623157e308, "-1.79769e+308", lambda n: (n - 30) / 8),
    "nan": Depth(32, "f", nan, "nan", lambda n: (n - 30) / 8),
}


class Layout(NamedTuple):
    """photometric: None leaves the tag out   extra: ExtraSamples, None leaves the tag out
    colours: the samples that are shown, from 0   refused: what the sentence must say, in place
    """

    photometric: int | None
    samples: int
    extra: tuple[int, ...] | None = None
    colours: tuple[int, ...] = ()
    alpha: int | None = None
    associated: bool = False
    refused: str | None = None


_NAME_THREE = r"holds 4 bands, .*--bands 1,2,3"
LAYOUTS = {
    "black": Layout(1, 1, None, (0,)),
    "white": Layout(0, 1, None, (0,)),
    "grey_unspecified": Layout(1, 2, (0,), refused=r"holds 2 bands, .*--bands 1"),
    "grey_untagged": Layout(0, 2, refused=r"holds 2 bands, .*--bands 1"),
    "grey_associated": Layout(1, 2, (1,), (0,), 1, True),
    "grey_alpha": Layout(1, 2, (2,), (0,), 1),
    "white_alpha": Layout(0, 2, (2,), (0,), 1),
    "three_bands": Layout(1, 3, (0, 0), (0, 1, 2)),
    "four_bands": Layout(1, 4, (0, 0, 0), refused=_NAME_THREE),
    "four_bands_untagged": Layout(1, 4, refused=_NAME_THREE),
    "three_bands_alpha": Layout(1, 4, (0, 0, 2), (0, 1, 2), 3),
    "rgb": Layout(2, 3, None, (0, 1, 2)),
    "rgb_untagged": Layout(2, 4, None, (0, 1, 2)),
    "rgb_unspecified": Layout(2, 4, (0,), (0, 1, 2)),
    "rgb_unknown": Layout(2, 4, (999,), (0, 1, 2)),
    "rgb_associated": Layout(2, 4, (1,), (0, 1, 2), 3, True),
    "rgb_alpha": Layout(2, 4, (2,), (0, 1, 2), 3),
    "rgb_near_infrared_alpha": Layout(2, 5, (0, 2), (0, 1, 2), 4),
    "rgb_too_few": Layout(2, 3, (2,), refused="holds 3 samples, of which ExtraSamples takes 1"),
    "lab": Layout(8, 3, refused=r"PhotometricInterpretation 8 \(CIELab\)"),
    "untagged": Layout(None, 1, refused="has no PhotometricInterpretation"),
}
PALETTE, INKS = Layout(3, 1, None, (0,)), Layout(5, 4, None, (0, 1, 2, 3))


class Case(NamedTuple):
    """What one file means; marked: whether its tag names no data."""

    depth: str
    layout: str
    marked: bool

    @property
    def name(self) -> str:
        return f"{self.depth}-{self.layout}{'-marked' if self.marked else ''}"

    @property
    def how(self) -> Layout:
        return {"palette": PALETTE, "inks": INKS}.get(self.layout) or LAYOUTS[self.layout]

    def samples(self) -> list[list[list[float]]]:
        """Rows of pixels of stored samples."""
        return [[self._pixel(y, x) for x in range(WIDTH)] for y in range(HEIGHT)]

    def _pixel(self, y: int, x: int) -> list[float]:
        depth, how, place = DEPTHS[self.depth], self.how, 5 * y + x
        if self.layout == "palette":
            return [(7 * place + 3) % COLOURS]
        if self.layout == "inks":
            return [
                ((37 * place + 61 * i) % 256) * (257 if depth.bits == 16 else 1) for i in range(4)
            ]
        found = [depth.value((37 * place + 61 * i) % 97) for i in range(how.samples)]
        if self.marked:
            if place in (0, 14):  # no band of the pixel has data
                found = [depth.no_data] * how.samples
            elif place == 6:  # one band of it has none
                found[0] = depth.no_data
        if how.alpha is not None:
            top = top_of(depth)
            found[how.alpha] = (0, top, top * (depth.kind == "f") / 4 or (top + 1) // 4)[place % 3]
        return found

    def tags(self) -> dict[int, tuple[int, object]]:
        """The file's tags that say what its samples mean, as tiff_writer takes them."""
        how, tags = self.how, {}
        if how.photometric is not None:
            tags[262] = (3, [how.photometric])
        if how.extra is not None:
            tags[338] = (3, list(how.extra))
        if self.marked:
            tags[42113] = (2, DEPTHS[self.depth].text.encode() + b"\0")
        if self.layout == "palette":
            bits = DEPTHS[self.depth].bits
            tags[320] = (3, [palette(i, c) * 257 for c in range(3) for i in range(1 << bits)])
        return tags


def palette(index: int, channel: int) -> int:
    """The colour of a palette's index, 0 to 255."""
    return (index * (29, 83, 151)[channel] + 17) % 256


def top_of(depth: Depth) -> int:
    return 1 if depth.kind == "f" else 2 ** (depth.bits - (depth.kind == "i")) - 1


def cases() -> list[Case]:
    """All of the meanings: six depths in every layout, the others in four."""
    found = []
    for depth, about in DEPTHS.items():
        few = depth in ("u12", "u32", "i8", "i32", "f16", "f64", "nan")
        for layout in ("black", "white", "rgb_unspecified", "rgb_alpha") if few else LAYOUTS:
            found.append(Case(depth, layout, False))
            if about.no_data is not None and LAYOUTS[layout].refused is None:
                found.append(Case(depth, layout, True))
    palettes = [Case("u4", "palette", False), Case("u8", "palette", False)]
    return [*found, *palettes, Case("u8", "inks", False), Case("u16", "inks", False)]


def look(case: Case) -> list[list[list[int]]]:
    """Rows of RGB pixels."""
    depth, rows = DEPTHS[case.depth], case.samples()
    if case.layout == "palette":
        return [[[palette(px[0], c) for c in range(3)] for px in row] for row in rows]
    if case.layout == "inks":
        return [
            [_from_inks([v // (257 if depth.bits == 16 else 1) for v in px]) for px in row]
            for row in rows
        ]
    low, high = _limits(case, rows)
    return [[_seen(case, pixel, low, high) for pixel in row] for row in rows]


def _missing(case: Case, value: float) -> bool:
    depth = DEPTHS[case.depth]
    return isnan(value) or (case.marked and value == depth.no_data)


def _alpha(case: Case, pixel: list[float]) -> Fraction:
    if case.how.alpha is None:
        return Fraction(1)
    return Fraction(pixel[case.how.alpha]) / top_of(DEPTHS[case.depth])


def _colour(case: Case, value: float, pixel: list[float]) -> Fraction:
    """A stored colour without alpha's part in it."""
    alpha = _alpha(case, pixel)
    return Fraction(value) / (alpha if case.how.associated and alpha else 1)


def _limits(case: Case, rows) -> tuple[Fraction, Fraction]:
    """The values that become black and white."""
    depth = DEPTHS[case.depth]
    if depth.kind == "u" and depth.bits <= 8:
        return Fraction(0), Fraction(top_of(depth))
    values = sorted(
        _colour(case, pixel[i], pixel)
        for row in rows
        for pixel in row
        for i in case.how.colours
        if not _missing(case, pixel[i]) and _alpha(case, pixel) > 0
    )
    return tuple(_percentile(values, Fraction(q, 100)) for q in (1, 99))


def _percentile(values: list[Fraction], share: Fraction) -> Fraction:
    """The value at a share of the way through sorted values, between its neighbours."""
    place = share * (len(values) - 1)
    below = floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def _seen(case: Case, pixel: list[float], low: Fraction, high: Fraction) -> list[int]:
    depth, how = DEPTHS[case.depth], case.how
    direct = depth.kind == "u" and depth.bits <= 8
    alpha = _alpha(case, pixel)
    colours = [pixel[i] for i in how.colours] * (
        4 - len(how.colours) if len(how.colours) == 1 else 1
    )
    if all(_missing(case, value) for value in colours):
        return [0, 0, 0]
    found = []
    for value in colours:
        if isnan(value) or (_missing(case, value) and not direct):
            share = Fraction(0)  # one band without data, in a pixel that has data
        else:
            plain = Fraction(value) if direct else _colour(case, value, pixel)
            share = min(max((plain - low) / (high - low), 0), 1)
        level = _rounded(255 * share)
        level = 255 - level if how.photometric == 0 else level
        part = level if direct and how.associated else alpha * level
        found.append(min(255, _rounded(part + 255 * (1 - alpha))))
    return found


def _rounded(value: Fraction) -> int:
    """To the nearest, halves to even; the case must not depend on the last bit of a float."""
    assert value.denominator < 3 or abs(value - floor(value) - Fraction(1, 2)) > Fraction(1, 10**9)
    return round(value)


def _from_inks(inks: list[int]) -> list[int]:
    """RGB of CMYK without a profile: every ink takes its part of what black leaves."""
    return [_rounded(Fraction((255 - ink) * (255 - inks[3]), 255)) for ink in inks[:3]]


def write_golden() -> None:
    import numpy as np

    shown = [case for case in cases() if case.how.refused is None]
    looks = np.array([look(case) for case in shown], np.uint8)
    np.savez_compressed(GOLDEN, looks=looks, names=[case.name for case in shown])
    print(f"{len(shown)} pictures, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    write_golden()
