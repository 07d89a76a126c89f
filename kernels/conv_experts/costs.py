# SPDX-License-Identifier: Apache-2.0
"""What Conv-LoRA adds to a LoRA layer by its design: FLOP, bytes and launches of the GPU path."""

from samfast.kernels._common.windows import Windows
from samfast.kernels.lora_linear.costs import Stage

_SOURCE = 16  # sources of a tile along an axis


def tile_flops(ratio: int, narrow: bool, rank: int, depthwise: bool) -> tuple[int, int]:
    """FLOP of one tile, forward and backward, as the Triton kernels compute it (README)."""
    out = 16 if narrow else 8
    points = 4 * out if ratio % 2 == 0 else 16
    channels = 1 if depthwise else rank
    mixing = 3 * channels * 4 * _SOURCE**2
    products = 3 * (_SOURCE * 4 * _SOURCE * points + points * _SOURCE * points)
    forward = 2 * rank * (mixing + products)
    return forward, forward + 2 * rank * (products + 2 * mixing)


def stages(
    windows: Windows, index: list[int], ratios: tuple[int, ...], rank: int, depthwise: bool,
    itemsize: int,
) -> list[Stage]:  # fmt: skip
    """The gate and the experts, forward and backward; index: the expert of each sample."""
    narrow = max(windows.height, windows.width) <= _SOURCE
    side = 16 if narrow else 8
    tiles = -(-windows.height // side) * -(-windows.width // side)
    costs = [tile_flops(ratios[e], narrow, rank, depthwise) for e in index]
    forward, backward = (tiles * sum(parts) for parts in zip(*costs, strict=True))
    h = itemsize * windows.tokens * rank
    numbers = rank * (1 if depthwise else rank) * 9 + rank
    patches = 4 * len(index) * tiles * rank * _SOURCE**2
    parts = 4 * len(index) * tiles * numbers
    return [
        Stage("noise", 0, 4 * len(index) * len(ratios), 1),
        Stage("gate", 0, h, 2),
        Stage("experts", forward, 2 * h, 1),
        Stage("experts backward", backward, 2 * h + patches + parts, 1),
        Stage("reduce dh, dweight, dbias", 0, 2 * h + patches + parts * len(ratios), 1),
    ]
