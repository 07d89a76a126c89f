# SPDX-License-Identifier: Apache-2.0
"""Outlines of masks along the corners of pixels: polygons that hold the same pixels exactly."""

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

# (x, y) from a pixel's first corner to where its edge starts, by direction: right along its upper
# side, down its right one, left along its lower one, up its left one. The pixel is on the right.
_STARTS = ((0, 0), (1, 0), (1, 1), (0, 1))
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
Ring = list[tuple[int, int]]


def polygons(mask: np.ndarray) -> list[list[Ring]]:
    """The outlines of bool (H, W): of each part that hangs together by sides, its outer ring first
    and then those of its holes.

    A ring is closed: its first corner (x, y) comes again at its end. Pixel (0, 0) lies from corner
    (0, 0) to (1, 1). No ring touches itself. The area of outer rings is positive by the shoelace
    formula, and that of holes negative; together they are the number of pixels.
    """
    mask = np.asarray(mask, bool)
    if not mask.any():
        return []
    parts, count = ndimage.label(mask)
    pixels, directions, following = _edges(mask)
    owners = (parts.ravel()[pixels] - 1).tolist()
    y, x = np.divmod(pixels, mask.shape[1])
    starts = np.stack([x, y], 1) + np.array(_STARTS)[directions]
    corners = list(map(tuple, starts.tolist()))
    found: list[list[Ring]] = [[] for _ in range(count)]
    for first, chain in _chains(directions.tolist(), following.tolist()):
        for ring in _simple([corners[edge] for edge in chain]):
            at = 0 if _area(ring) > 0 else len(found[owners[first]])
            found[owners[first]].insert(at, [*ring, ring[0]])
    return found


def _edges(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every side of a pixel behind which there is none: (pixel, direction, the next edge)."""
    width = mask.shape[1]
    padded = np.pad(mask, 1)
    beyond = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    found = [np.flatnonzero(mask & ~other) for other in beyond]
    directions = np.repeat(np.arange(4), [len(own) for own in found])
    pixels = np.concatenate(found)
    y, x = np.divmod(pixels, width)
    start = np.stack([x, y], 1) + np.array(_STARTS)[directions]
    end = start + np.array(_STEPS)[directions]
    keys = (start[:, 1] * (width + 1) + start[:, 0]) * 4 + directions
    order = np.argsort(keys)
    base = (end[:, 1] * (width + 1) + end[:, 0]) * 4
    following = np.full(len(keys), -1)
    # Right first: where two pixels meet at a corner only, each outline stays with its pixel.
    for turn in (1, 0, 3):
        wanted = base + (directions + turn) % 4
        place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
        edge = order[place]
        fits = (following < 0) & (keys[edge] == wanted)
        following[fits] = edge[fits]
    return pixels, directions, following


def _chains(directions: list[int], following: list[int]) -> Iterator[tuple[int, list[int]]]:
    """(an edge, the edges of its outline at which the direction changes), of each outline."""
    done = bytearray(len(following))
    for first in range(len(following)):
        if done[first]:
            continue
        chain: list[int] = []
        edge = first
        while not done[edge]:
            done[edge] = 1
            after = following[edge]
            if directions[after] != directions[edge]:
                chain.append(after)
            edge = after
        yield first, chain


def _simple(ring: Ring) -> list[Ring]:
    """The ring cut where it comes to a corner again, so that no part touches itself."""
    found: list[Ring] = []
    path: Ring = []
    places: dict[tuple[int, int], int] = {}
    for corner in ring:
        if corner in places:
            cut = places[corner]
            found.append(path[cut:])
            for gone in path[cut + 1 :]:
                del places[gone]
            del path[cut + 1 :]
        else:
            places[corner] = len(path)
            path.append(corner)
    return [*found, path]


def _area(ring: Ring) -> float:
    """Half the sum of cross products: positive for what runs from x to y."""
    return sum(ring[i - 1][0] * y - x * ring[i - 1][1] for i, (x, y) in enumerate(ring)) / 2
