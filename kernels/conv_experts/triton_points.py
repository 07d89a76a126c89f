# SPDX-License-Identifier: Apache-2.0
"""A tile's banded matrices, and the points they give."""

import triton
import triton.language as tl

from samfast.kernels.conv_experts.triton_footprint import finite

NOWHERE = tl.constexpr(-(2**30))  # a position outside every map


@triton.jit
def points_of(first_out, size, ratio, PHASES: tl.constexpr, OUT: tl.constexpr,
              POINTS: tl.constexpr):  # fmt: skip
    """Enlarged positions (POINTS,) that the shrinking reads, very negative where none is.

    Point p is phase p % PHASES of output first_out + p // PHASES.
    """
    point = tl.arange(0, POINTS)
    out = first_out + point // PHASES
    position = ratio * out + (ratio - 1) // 2
    if PHASES == 4:
        position = ratio * out + ratio // 2 - 2 + point % PHASES
        position = tl.minimum(tl.maximum(position, 0), ratio * size - 1)
    return tl.where((point // PHASES < OUT) & (out < size), position, NOWHERE)


@triton.jit
def banded(position, tap, source, size, ratio):
    """L: what position + tap of the enlarged line reads of each source, as bicubic weights with
    A = -0.75; nothing outside the line, nor for a tap beyond the third. Of the broadcast shape of
    position, tap, which is -1, 0, 1 or 2, and source."""
    at = position + tap
    live = (at >= 0) & (at < ratio * size) & (tap < 2)
    above = 2 * tl.maximum(at, 0) + 1 + ratio  # 2 · ratio · (source coordinate + 1)
    low = above // (2 * ratio)
    t = (above - 2 * ratio * low).to(tl.float32) * (0.5 / ratio)
    u = 1.0 - t
    w0, w1 = -0.75 * t * u * u, (1.25 * t - 2.25) * t * t + 1.0
    w2, w3 = (1.25 * u - 2.25) * u * u + 1.0, -0.75 * u * t * t
    last = size - 1  # of the four sources low - 2 + (0, 1, 2, 3) those outside the map are clamped
    weight = tl.where(tl.minimum(tl.maximum(low - 2, 0), last) == source, w0, 0.0)
    weight += tl.where(tl.minimum(tl.maximum(low - 1, 0), last) == source, w1, 0.0)
    weight += tl.where(tl.minimum(low, last) == source, w2, 0.0)
    weight += tl.where(tl.minimum(low + 1, last) == source, w3, 0.0)
    return tl.where(live, weight, 0.0)


@triton.jit
def all_taps(position, first_source, size, ratio, SOURCE: tl.constexpr):
    """L of every tap side by side: (POINTS, 4 · SOURCE)."""
    source = first_source + tl.arange(0, SOURCE)
    tap = tl.arange(0, 4) - 1
    line = banded(position[:, None, None], tap[None, :, None], source[None, None, :], size, ratio)
    return tl.reshape(line, (position.shape[0], 4 * SOURCE))


@triton.jit
def shrinking(PHASES: tl.constexpr):
    """Weights (PHASES,) of an output's points along one axis: bicubic at one half."""
    phase = tl.arange(0, PHASES)
    if PHASES == 4:
        return tl.where((phase == 0) | (phase == 3), -0.09375, 0.59375)
    return phase.to(tl.float32) + 1.0


@triton.jit
def points(h_ptr, weight_ptr, bias_ptr, row, inside, sound, lines, columns, first_line, height, o,
           expert, ratio, rank, channels, DEPTHWISE: tl.constexpr,
           SOURCE: tl.constexpr):  # fmt: skip
    """What the activation sees, (POINTS, POINTS), for channel o of an expert, without the sources
    that are not finite, for zero times those is NaN; and ``sound`` without them.

    row, inside, sound (SOURCE, SOURCE): the sources   lines (POINTS,): positions from points_of
    columns (POINTS, 4 · SOURCE): L of all taps   first_line: the sources' first line
    """
    tap = tl.arange(0, 4)
    kernel_ptr = weight_ptr + (expert * rank + o) * channels * 9
    p = tl.zeros((columns.shape[0], columns.shape[0]), tl.float32)
    p += tl.load(bias_ptr + expert * rank + o).to(tl.float32)
    for a in range(0, 3):
        mixed = tl.zeros((SOURCE, 4, SOURCE), tl.float32)
        for i in range(0, channels):
            channel = o if DEPTHWISE else i
            z = tl.load(h_ptr + row * rank + channel, inside, other=0.0).to(tl.float32)
            sound &= finite(z)
            z = tl.where(finite(z), z, 0.0)
            k = tl.load(kernel_ptr + i * 9 + a * 3 + tap, tap < 3, other=0.0).to(tl.float32)
            mixed += k[None, :, None] * z[:, None, :]
        mixed = tl.reshape(mixed, (SOURCE, 4 * SOURCE))
        t = tl.dot(mixed, tl.trans(columns), input_precision="ieee")  # (SOURCE, POINTS)
        source = first_line + tl.arange(0, SOURCE)
        line = banded(lines[:, None], a - 1, source[None, :], height, ratio)  # (POINTS, SOURCE)
        p = tl.dot(line, t, p, input_precision="ieee")
    return p, sound
