# SPDX-License-Identifier: Apache-2.0
"""How far one NaN or infinity of a map reaches, and how products with zeros do not spread it.

Zero times NaN is NaN, so a banded matrix times a line with a NaN is NaN everywhere. Values that are
not finite are therefore taken out before such products, and what they reach becomes NaN afterwards.
Along both axes an output reads sources at most ``reach`` away. A source affects gradients at most
``twice`` away: those of sources that share a point with it. Every source within is read.
"""

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def distances(ratios: tuple[int, ...], device: torch.device) -> Tensor:
    """(M, 2): reach and twice of every expert."""
    both = [[reach(ratio), twice(ratio)] for ratio in ratios]
    return torch.tensor(both, dtype=torch.int64, device=device)


def reach(ratio: int) -> int:
    """Sources that an output of an expert with this ratio reads, to either side."""
    return {1: 1, 2: 3}.get(ratio, 2)


def twice(ratio: int) -> int:
    """Sources to either side that have a point in common with a source."""
    return 2 if ratio == 1 else 4


def finite(t: Tensor) -> tuple[Tensor, Tensor | None]:
    """t with zeros for what is not finite, and where that is.

    On a CPU the mask is None if everything is finite. On a GPU that check would wait for the GPU.
    """
    if t.device.type == "cpu" and t.sum().isfinite():
        return t, None
    broken = ~t.isfinite()
    return t.masked_fill(broken, 0.0), broken


def spoiled(t: Tensor, broken: Tensor | None, radius: Tensor, depthwise: bool) -> Tensor:
    """t with NaN at most radius away from a broken pixel, see ``spread``."""
    return t if broken is None else t.masked_fill(spread(broken, radius, depthwise), torch.nan)


def spread(broken: Tensor, radius: Tensor, depthwise: bool) -> Tensor:
    """What lies at most radius away from a broken one, (N, H, W, r), or (N, H, W, 1) where
    channels are mixed.

    broken: (N, H, W, r), bool   radius: (N,), of each sample
    """
    if not depthwise:
        broken = broken.any(-1, keepdim=True)
    hit = broken.permute(0, 3, 1, 2).float()
    down, across = (_near(n, radius) for n in hit.shape[2:])
    return (down @ hit @ across).permute(0, 2, 3, 1) > 0


def _near(length: int, radius: Tensor) -> Tensor:
    """(N, 1, length, length): ones where two positions are at most radius apart."""
    at = torch.arange(length, device=radius.device)
    return ((at[:, None] - at).abs() <= radius[:, None, None, None]).float()
