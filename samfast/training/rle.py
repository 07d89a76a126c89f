# SPDX-License-Identifier: Apache-2.0
"""Run lengths of masks as COCO has them: columns one after the other, background first.

Every function raises ValueError with a phrase that follows the name of what holds the run lengths.
"""

from collections.abc import Sequence
from reprlib import Repr
from typing import Any

import numpy as np

MOST_SIDE = 2**31 - 1
_FIRST, _LAST = 48, 111  # the characters of compressed run lengths: six bits each
_MOST_CHARACTERS = 7  # of one number, which then has 35 bits
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring = 2, 4, 4, 60


def shown(value: Any) -> str:
    """A value in a sentence: its text, cut short however large it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def is_whole(value: Any) -> bool:
    """True for an integer; False for True and False."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_size(size: Any) -> tuple[int, int]:
    """(height, width) of a list of two integers from 1 to 2**31 - 1."""
    fits = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2
    if not fits or not all(is_whole(side) and 0 < side <= MOST_SIDE for side in size):
        raise ValueError(
            f"has the size {shown(size)}; expected [height, width], two integers from 1 to "
            f"{MOST_SIDE}"
        )
    return int(size[0]), int(size[1])


def counts_of(rle: Any, size: Sequence[int]) -> np.ndarray:
    """int64 run lengths, which add up to the pixels of ``size`` (height, width).

    rle: {"size": [height, width], "counts": list of integers, or compressed text}
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError(f"is {shown(rle)}; expected an RLE with size and counts")
    own = check_size(rle["size"])
    if own != tuple(size):
        raise ValueError(
            f"has an RLE of size {list(own)} in an image of size {list(size)} (height, width); "
            "export it again from this image"
        )
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        numbers = _decompressed(counts)
    elif isinstance(counts, (list, tuple, np.ndarray)):
        numbers = _checked(list(counts), own[0] * own[1])
    else:
        raise ValueError(f"has the counts {shown(counts)}; expected a list of integers, or text")
    total = int(numbers.sum())
    if numbers.min(initial=0) < 0 or total != own[0] * own[1]:
        low = int(numbers.min(initial=0))
        wrong = f"one is {low}" if low < 0 else f"they add up to {total}"
        raise ValueError(
            f"has run lengths that do not fit: {wrong}, and height * width is "
            f"{own[0] * own[1]}; export it again"
        )
    return numbers


def _checked(counts: list, pixels: int) -> np.ndarray:
    for count in counts:
        if not is_whole(count) or not 0 <= count <= pixels:
            raise ValueError(
                f"has the run length {shown(count)}; expected integers from 0 to {pixels}, the "
                "image's pixels"
            )
    return np.array(counts, np.int64)


def _decompressed(text: str | bytes) -> np.ndarray:
    """Numbers of five bits a character, the sixth saying that more follow; from the fourth number
    on they are differences to the one two before."""
    try:
        data = np.frombuffer(text.encode("ascii") if isinstance(text, str) else text, np.uint8)
    except UnicodeEncodeError:
        data = np.zeros(1, np.uint8)
    if data.size and (data.min() < _FIRST or data.max() > _LAST):
        raise ValueError(
            f"has the counts {shown(text)}, which is not a compressed RLE; expected characters "
            "from 0 to o"
        )
    digits = data.astype(np.int64) - _FIRST
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    lengths = ends - starts + 1
    if (data.size and (not len(ends) or ends[-1] != data.size - 1)) or (
        lengths.max(initial=0) > _MOST_CHARACTERS
    ):
        raise ValueError(f"has the counts {shown(text)}, which ends within a number")
    if not data.size:
        return np.zeros(0, np.int64)
    places = np.arange(data.size) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((digits & 31) << (5 * places), starts)
    negative = digits[ends] & 16 != 0
    numbers[negative] -= np.int64(1) << (5 * lengths[negative])
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def compressed(counts: Sequence[int]) -> str:
    """Run lengths as the text that pycocotools writes."""
    out = bytearray()
    counts = [int(count) for count in counts]
    for i, count in enumerate(counts):
        left = count - counts[i - 2] if i > 2 else count
        while True:
            digit = left & 31
            left >>= 5
            more = left != (-1 if digit & 16 else 0)
            out.append(_FIRST + digit + 32 * more)
            if not more:
                break
    return out.decode("ascii")


def runs_of(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of foreground start and end (exclusive), in pixels of the columns in a row."""
    edges = np.concatenate([[0], np.cumsum(counts)])
    starts, ends = edges[1:-1:2], edges[2::2]
    some = ends > starts
    return starts[some], ends[some]


def counts_of_runs(starts: np.ndarray, ends: np.ndarray, pixels: int) -> np.ndarray:
    """The run lengths of sorted runs of foreground; runs that touch become one."""
    if not len(starts):
        return np.array([pixels], np.int64)
    apart = starts[1:] > ends[:-1]
    starts, ends = starts[np.r_[True, apart]], ends[np.r_[apart, True]]
    edges = np.stack([starts, ends], 1).ravel()
    counts = np.diff(edges, prepend=0, append=pixels)
    return counts if counts[-1] else counts[:-1]
