# SPDX-License-Identifier: Apache-2.0
"""What Conv-LoRA adds to a LoRA layer by design: FLOP, bytes and launches of the GPU path.

A function named after a kernel returns the FLOP of one launch, from its arguments.
"""

from samfast.kernels._common.windows import Windows
from samfast.kernels.expert_gate import costs as gate
from samfast.kernels.lora_linear.costs import Stage

_SOURCE = 16  # sources of a tile along an axis


def tile_flops(
    ratio: int, narrow: bool, rank: int, depthwise: bool, gelu: bool = True, needs: int = 2
) -> tuple[int, int]:
    """FLOP of one tile, forward and backward, as the Triton kernels compute it (README).

    gelu: whether the backward computes the points again
    needs: how many gradients it makes, of h and of the weights
    """
    out = 16 if narrow else 8
    points = 4 * out if ratio % 2 == 0 else 16
    channels = 1 if depthwise else rank
    mixing = 3 * channels * 4 * _SOURCE**2
    products = 3 * (_SOURCE * 4 * _SOURCE * points + points * _SOURCE * points)
    forward = 2 * rank * (mixing + products)
    return forward, gelu * forward + 2 * rank * (products + needs * mixing)


def forward_kernel(index_ptr, height, width, RATIOS, rank, DEPTHWISE, **_) -> int:
    """FLOP if all experts have the same number of samples; only the GPU knows how many each has."""
    return _mean(0, index_ptr, height, width, RATIOS, rank, DEPTHWISE)


def backward_kernel(
    index_ptr, height, width, RATIOS, rank, DEPTHWISE, GELU, NEED_H, NEED_WEIGHT, **_
) -> int:
    """As forward_kernel's."""
    needs = NEED_H + NEED_WEIGHT
    return _mean(1, index_ptr, height, width, RATIOS, rank, DEPTHWISE, GELU, needs)


def _mean(way, index, height, width, ratios, *options) -> int:
    narrow = max(height, width) <= _SOURCE
    costs = [tile_flops(ratio, narrow, *options)[way] for ratio in ratios]
    return len(index) * _tiles(height, width) * sum(costs) // len(costs)


def _tiles(height: int, width: int) -> int:
    side = 16 if max(height, width) <= _SOURCE else 8
    return -(-height // side) * -(-width // side)


def stages(
    windows: Windows, index: list[int], ratios: tuple[int, ...], rank: int, depthwise: bool,
    itemsize: int,
) -> list[Stage]:  # fmt: skip
    """The gate and the experts, forward and backward; index: the expert of each sample."""
    narrow = max(windows.height, windows.width) <= _SOURCE
    tiles = _tiles(windows.height, windows.width)
    costs = [tile_flops(ratios[e], narrow, rank, depthwise) for e in index]
    forward, backward = (tiles * sum(parts) for parts in zip(*costs, strict=True))
    h = itemsize * windows.tokens * rank
    numbers = rank * (1 if depthwise else rank) * 9 + rank
    patches = 4 * len(index) * tiles * rank * _SOURCE**2
    parts = 4 * len(index) * tiles * numbers
    return [
        Stage("noise", 0, 4 * len(index) * len(ratios), 1),
        Stage("gate", gate.gate(len(index), rank, len(ratios)), h, 2),
        Stage("experts", forward, 2 * h, 1),
        Stage("experts backward", backward, 2 * h + patches + parts, 1),
        Stage("reduce dh, dweight, dbias", 0, 2 * h + patches + parts * len(ratios), 1),
    ]
