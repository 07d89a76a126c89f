# SPDX-License-Identifier: Apache-2.0
"""Tiles of the Triton kernels: a function of the sizes over tiles.json, no search at run time.

The file: target -> way the bias enters -> stage -> bytes per element -> widest padded head_dim ->
[BLOCK_M, BLOCK_N or BLOCK_T, num_warps, num_stages], and for the forward by rows how many lines of
keys a turn takes, if not one. A target without an entry takes the default's.
A way without one takes another's: "uneven_rows" that of "rows", "one_hot_map" (a whole map) and
"plain" (no bias) that of "one_hot", and "plain_padded" that of "plain".
"""

import functools
import json
from pathlib import Path

import torch

from samfast.kernels._common.windows import Windows

TILES = Path(__file__).with_name("tiles.json")
SMALL = 16  # lines and columns of a window, at most, where the bias enters by one-hot tiles
NARROW_ROWS = 32  # up to this width, and where there are pads, lines have tiles of their own
REGISTERS = 255  # of a thread; without a bound ptxas may stop earlier and spill
ALIGNED = 16  # elements; lines of rel_w start at multiples
_WAYS = {
    "rows": ("rows",),
    "uneven_rows": ("uneven_rows", "rows"),
    "one_hot": ("one_hot",),
    "one_hot_map": ("one_hot_map", "one_hot"),
    "plain": ("plain", "one_hot"),
    "plain_padded": ("plain_padded", "plain", "one_hot"),
}


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def split(head_dim: int) -> tuple[int, int]:
    """head_dim as a power of two and the rest, padded to one; 0 without a rest."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    return first, power_of_two(rest) if rest else 0


def one_hot(windows: Windows) -> bool:
    """Whether the bias enters by one-hot tiles; else by rows."""
    return max(windows.height, windows.width) <= SMALL


def pitch(columns: int) -> int:
    """How many positions a line of a small window takes: a power of two, so as not to divide."""
    return power_of_two(columns, 8)


def factor_terms(windows: Windows) -> tuple[int, int]:
    """Elements a token of rel_h and of rel_w; 0 of rel_w where one line holds both."""
    if one_hot(windows):
        return 2 * SMALL, 0
    return windows.height, ALIGNED * -(-windows.width // ALIGNED)


def target(x: torch.Tensor) -> str:
    """The table of the GPU that holds x; interpreted kernels have few and large tiles."""
    if not x.is_cuda:
        return "interpreter"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(x.device))


@functools.cache
def _table() -> dict:
    return json.loads(TILES.read_text(encoding="utf-8"))


def targets() -> list[str]:
    """The names of the file's tables."""
    return list(_table())


@functools.cache
def _sizes(name: str, stage: str, way: str, itemsize: str, head_dim: int) -> list[int]:
    for table in (_table().get(name, {}), _table()["default"]):
        for known in _WAYS[way]:
            heads = table.get(known, {}).get(stage, {}).get(itemsize, {})
            fitting = [int(most) for most in heads if int(most) >= head_dim]
            if fitting:
                return heads[str(min(fitting))]
    raise KeyError(f"no tile of {stage}, {way}, for {itemsize} bytes and head_dim {head_dim}")


def blocks(stage: str, x: torch.Tensor, windows: Windows, tables: bool = True) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages and maybe LINES of a stage; x (…, head_dim).

    tables: whether there is a bias
    """
    way = "uneven_rows" if windows.pads or windows.width <= NARROW_ROWS else "rows"
    if one_hot(windows):
        way = "one_hot_map" if windows.down == windows.across == 1 else "one_hot"
    if not tables:
        way = "plain_padded" if windows.pads else "plain"
    padded = sum(split(x.shape[-1]))
    m, n, warps, stages, *lines = _sizes(target(x), stage, way, str(x.element_size()), padded)
    block = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    return block | ({"LINES": lines[0]} if lines else {}) | {"maxnreg": REGISTERS}
