# SPDX-License-Identifier: Apache-2.0
"""Outlines of masks: the same pixels again, and rings that touch themselves nowhere."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from samfast.training.outlines import polygons


def inside(rings, shape) -> np.ndarray:
    """Even-odd: which centres of pixels have an odd number of vertical sides to their left."""
    out = np.zeros(shape, bool)
    for ring in rings:
        for (x0, y0), (x1, y1) in itertools.pairwise(ring):
            if x0 == x1:
                out[min(y0, y1) : max(y0, y1), x0:] ^= True
    return out


def area(ring) -> float:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in itertools.pairwise(ring)) / 2


def check(mask: np.ndarray) -> None:
    parts = polygons(mask)
    labels, count = ndimage.label(mask)
    assert len(parts) == count
    seen = set()
    for rings in parts:
        pixels = inside(rings, mask.shape)
        part = labels[pixels][0]
        seen.add(part)
        np.testing.assert_array_equal(pixels, labels == part)
        areas = [area(ring) for ring in rings]
        assert areas[0] > 0 and all(own < 0 for own in areas[1:])
        assert sum(areas) == pixels.sum()
        assert len(rings) - 1 == holes(pixels)
        for ring in rings:
            assert ring[0] == ring[-1]
            assert len(set(ring)) == len(ring) - 1 >= 4  # touches itself nowhere
            check_corners(ring)
    assert seen == set(range(1, count + 1))


def holes(part: np.ndarray) -> int:
    """Areas of background that hang together by sides only, but for those at the outside."""
    _background, count = ndimage.label(~np.pad(part, 1))
    # Background that reaches the outside by a corner is a hole too: the part closes it.
    return count - 1


def check_corners(ring) -> None:
    """Every corner turns by a right angle."""
    steps = [(x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in itertools.pairwise(ring)]
    for (x0, y0), (x1, y1) in zip(steps, steps[1:] + steps[:1], strict=True):
        assert x0 * x1 + y0 * y1 == 0


PICTURES = {
    "pixel": ["#"],
    "row": ["####"],
    "hole": ["###", "#.#", "###"],
    "two holes that meet at a corner": ["####", "#.##", "##.#", "####"],
    "a hole that meets the outside at a corner": ["##.", "#.#", "###"],
    "two pixels that meet at a corner": ["#.", ".#"],
    "diamond": [".#.", "#.#", ".#."],
    "an island in a hole": ["#####", "#...#", "#.#.#", "#...#", "#####"],
    "two parts": ["#..#", "#..#"],
    "an island that meets its ring at a corner": ["####", "#..#", "#.##", "#.#.", "####"],
    "a chain of holes": ["#####", "#.###", "##.##", "###.#", "#####"],
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    check(np.array([[c == "#" for c in row] for row in PICTURES[name]]))


def test_none():
    assert polygons(np.zeros((3, 4), bool)) == []


def test_a_pixel():
    ((ring,),) = polygons(np.ones((1, 1), bool))
    at = ring.index((0, 0))
    assert [*ring[at:-1], *ring[:at]] == [(0, 0), (1, 0), (1, 1), (0, 1)]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("seed", range(15))
def test_noise(seed, share):
    rng = np.random.default_rng(seed)
    check(rng.random(rng.integers(1, 24, 2)) < share)


@pytest.mark.slow
def test_all_masks_of_three_by_four():
    for number in range(1 << 12):
        check(np.array([number >> i & 1 for i in range(12)], bool).reshape(3, 4))
