# SPDX-License-Identifier: Apache-2.0
"""Where a tile of ``conv_experts`` stands in memory."""

import triton
import triton.language as tl


@triton.jit
def place(sample, height, width, image_height, image_width, down, across):
    """Image of a sample and its window's first line and column there."""
    image = sample // (down * across)
    window = sample - image * (down * across)
    return image.to(tl.int64), (window // across) * height, (window % across) * width


@triton.jit
def rows_of(sample, y, x, height, width, image_height, image_width, down, across):
    """Rows of pixels (y, x) of a sample in the image buffer and in the pad buffer, and which of the
    two holds them; neither holds a pixel outside the window. y (Y, 1), x (1, X); rows int64."""
    image, first_line, first_column = place(
        sample, height, width, image_height, image_width, down, across
    )
    line, column = first_line + y, first_column + x
    window = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    inside = (line < image_height) & (column < image_width)
    row = (image * image_height + line) * image_width + column
    wide = across * width
    right = wide - image_width
    beside = line * right + column - image_width
    below = image_height * right + (line - image_height) * wide + column
    pads = down * height * wide - image_height * image_width
    pad_row = image * pads + tl.where(line < image_height, beside, below)
    return row, pad_row, window & inside, window & (inside == 0)
