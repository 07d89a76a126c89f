# SPDX-License-Identifier: Apache-2.0
"""What one NaN or infinity reaches, see footprint.py. The products of a tile leave it out. If there
is one, which is rare, its footprint becomes NaN afterwards."""

import triton
import triton.language as tl

from samfast.kernels.conv_experts.triton_places import rows_of


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")  # not so of NaN


@triton.jit
def any_broken(sound):
    return tl.sum(tl.sum((sound == 0).to(tl.int32), 1), 0) > 0


@triton.jit
def reach(ratio):
    """Sources that an output reads to either side."""
    return tl.where(ratio == 1, 1, tl.where(ratio == 2, 3, 2))


@triton.jit
def twice(ratio):
    """Sources to either side that have a point in common with a source."""
    return tl.where(ratio == 1, 2, 4)


@triton.jit
def broken_near(values_ptr, pad_ptr, sample, y, x, radius, o, rank, height, width, image_height,
                image_width, down, across, MIXED: tl.constexpr):  # fmt: skip
    """Whether a value at most radius away from pixels (y, x) is not finite, (Y, X).

    values_ptr (tokens, r); pad_ptr: the same of the padding, None where it is zero
    MIXED: in any channel, else in channel o
    """
    side = 2 * radius + 1
    hit = tl.full((y.shape[0], x.shape[1]), False, tl.int1)
    for step in range(0, side * side):
        row, pad_row, inside, padded = rows_of(
            sample, y + (step // side - radius), x + (step % side - radius), height, width,
            image_height, image_width, down, across,
        )  # fmt: skip
        for i in range(0, rank if MIXED else 1):
            channel = i if MIXED else o
            hit |= finite(tl.load(values_ptr + row * rank + channel, inside, other=0.0)) == 0
            if pad_ptr is not None:
                hit |= finite(tl.load(pad_ptr + pad_row * rank + channel, padded, other=0.0)) == 0
    return hit


@triton.jit
def spoil(dz_ptr, dz_pad_ptr, h_ptr, patch_ptr, part_ptr, sample, first_y, first_x, first, last,
          ratio, rank, channels, height, width, image_height, image_width, down, across,
          GELU: tl.constexpr, DEPTHWISE: tl.constexpr, NEED_H: tl.constexpr,
          NEED_WEIGHT: tl.constexpr, OUTS: tl.constexpr, HALO: tl.constexpr,
          SOURCE: tl.constexpr):  # fmt: skip
    """NaN where a tile's gradients of channels first to last - 1 hang on what was left out.

    patch_ptr, part_ptr: where the tile's begin. Whatever is found in the sample may be written to
    every patch of it, for all of them are added.
    """
    out, source = tl.arange(0, OUTS), tl.arange(0, SOURCE)
    y, x = (first_y - HALO + source)[:, None], (first_x - HALO + source)[None, :]
    number = tl.arange(0, 16)
    for o in range(first, last):
        if NEED_WEIGHT:
            outputs = broken_near(
                dz_ptr, dz_pad_ptr, sample, (first_y + out)[:, None], (first_x + out)[None, :], 0,
                o, rank, height, width, image_height, image_width, down, across, False,
            )  # fmt: skip
            hit = tl.sum(tl.sum(outputs.to(tl.int32), 1), 0)
            if GELU:
                sources = broken_near(
                    h_ptr, None, sample, y, x, 0, o, rank, height, width, image_height,
                    image_width, down, across, not DEPTHWISE,
                )  # fmt: skip
                hit += tl.sum(tl.sum(sources.to(tl.int32), 1), 0)
            if hit > 0:
                tl.store(part_ptr + rank * channels * 9 + o, float("nan"))
                for i in range(0, channels):
                    kernel_at = (o * channels + i) * 9 + number
                    tl.store(part_ptr + kernel_at, float("nan"), number < 9)
    if NEED_H:
        for o in range(first if DEPTHWISE else 0, last if DEPTHWISE else rank):
            hit = broken_near(
                dz_ptr, dz_pad_ptr, sample, y, x, reach(ratio), o, rank, height, width,
                image_height, image_width, down, across, not DEPTHWISE,
            )  # fmt: skip
            if GELU:  # a source that shares a point with another sees its slopes
                hit |= broken_near(
                    h_ptr, None, sample, y, x, twice(ratio), o, rank, height, width, image_height,
                    image_width, down, across, not DEPTHWISE,
                )  # fmt: skip
            at = patch_ptr + o * SOURCE * SOURCE + source[:, None] * SOURCE + source[None, :]
            tl.store(at, float("nan"), hit)
