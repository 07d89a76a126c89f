# SPDX-License-Identifier: Apache-2.0
"""What enlarging, shifting and shrinking read along one axis, as small banded matrices.

The shrinking resample reads at most four enlarged positions per output, its phases. The 3×3
convolution reads one position on each side of these, its taps. Each of those is a bicubic mean of
four source values. Everything is a product of matrices that depend only on the length and ratio.
"""

import functools

import torch
from torch import Tensor

PHASES = 4
EVEN_WEIGHTS = (-3 / 32, 19 / 32, 19 / 32, -3 / 32)  # bicubic at one half
ODD_WEIGHTS = (1.0, 0.0, 0.0, 0.0)  # an odd ratio shrinks to the centre of each cell
_A = -0.75


def bicubic(t: float) -> tuple[float, float, float, float]:
    """Weights of the four neighbours at fraction t between the second and the third."""

    def near(d):
        return ((_A + 2) * d - (_A + 3)) * d * d + 1

    def far(d):
        return ((_A * d - 5 * _A) * d + 8 * _A) * d - 4 * _A

    return far(t + 1), near(t), near(1 - t), far(2 - t)


def positions(length: int, ratio: int, output: int) -> list[int]:
    """The enlarged positions that one output coordinate reads, one per phase."""
    if ratio % 2:
        return [ratio * output + ratio // 2]
    first = ratio * output + ratio // 2 - 2
    return [min(max(first + j, 0), ratio * length - 1) for j in range(PHASES)]


@functools.lru_cache(maxsize=64)
def matrices(length: int, ratio: int) -> Tensor:
    """(3 taps, 4 phases, outputs, sources) in float64; phases that are not read are zero."""
    table = torch.zeros(3, PHASES, length, length, dtype=torch.float64, device="cpu")
    for output in range(length):
        for phase, position in enumerate(positions(length, ratio, output)):
            for tap in range(3):
                at = position + tap - 1
                if not 0 <= at < ratio * length:
                    continue  # the convolution's zero padding
                numerator = 2 * at + 1 - ratio  # source = (at + 1/2) / ratio - 1/2
                whole = numerator // (2 * ratio)
                fraction = (numerator - 2 * ratio * whole) / (2 * ratio)
                for k, value in enumerate(bicubic(fraction)):
                    source = min(max(whole - 1 + k, 0), length - 1)
                    table[tap, phase, output, source] += value
    return table


@functools.lru_cache(maxsize=64)
def tables(
    length: int, ratios: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """For every ratio its matrices (M, 3, 4, n, n) and the weights of its phases (M, 4)."""
    weights = [ODD_WEIGHTS if ratio % 2 else EVEN_WEIGHTS for ratio in ratios]
    stacked = torch.stack([matrices(length, ratio) for ratio in ratios])
    return stacked.to(device, dtype), torch.tensor(weights, dtype=dtype, device=device)
