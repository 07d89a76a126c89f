# SPDX-License-Identifier: Apache-2.0
"""Where queries and keys of a window lie, their padding and the way back, and how rows are read.

head_dim is the largest power of two in it, HEAD_A, and a rest, HEAD_B.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NO_PADS, ZERO_PADS, GIVEN_PADS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def place(group, heads, height, width, image_height, image_width, down, across):
    """Image and head of a group, its window's first line and column in the image, and how many
    lines and columns of the window hold queries."""
    head = group % heads
    sample = group // heads
    image = sample // (down * across)
    window = sample - image * (down * across)
    top, left = (window // across) * height, (window % across) * width
    lines = tl.minimum(image_height - top, height)
    columns = tl.minimum(image_width - left, width)
    return image, head, top, left, lines, columns


@triton.jit
def shift_of(columns):
    """A line of queries of a small window takes two to the power of this, 8 or 16, positions."""
    return tl.where(columns <= 8, 3, 4)


@triton.jit
def positions(lines, columns, SMALL: tl.constexpr):
    """How many positions of queries a window has."""
    return lines << shift_of(columns) if SMALL else lines * columns


@triton.jit
def small_places(columns, BLOCK_M: tl.constexpr):
    """Lines and columns of BLOCK_M positions of a small window from the start of a line on."""
    i = tl.arange(0, BLOCK_M)
    narrow = columns <= 8
    return tl.where(narrow, i // 8, i // 16), tl.where(narrow, i % 8, i % 16)


@triton.jit
def queries(first, top, left, lines, columns, SMALL: tl.constexpr, FLAT: tl.constexpr,
            FULL: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Which of BLOCK_M queries exist, and their lines and columns in the image.

    SMALL: at most 16 columns, whose lines take a power of two; saves the division
    FLAT: the window is the map and the map lies in memory as one line; saves it too
    FULL: all of them exist
    """
    i = tl.arange(0, BLOCK_M)
    if SMALL:
        y, x = small_places(columns, BLOCK_M)
        y += first >> shift_of(columns)
        live = (y < lines) & (x < columns)
    else:
        i += first
        y = tl.zeros_like(i) if FLAT else i // columns
        x = i - y * columns
        live = i < lines * columns
    if FULL:
        live = tl.full((BLOCK_M,), True, tl.int1)
    return live, top + y, left + x


@triton.jit
def start_of(ptr, image, head, stride_b, stride_n):
    return ptr + image.to(tl.int64) * stride_b + head.to(tl.int64) * stride_n


@triton.jit
def pixels(ptr, y, x, stride_y, stride_x, WIDE: tl.constexpr):
    """WIDE: an image spans more elements than int32 counts"""
    if WIDE:
        y, x = y.to(tl.int64), x.to(tl.int64)
    return ptr + (y * stride_y + x * stride_x)


@triton.jit
def key_rows(ptr, pad_ptr, y, x, inside, stride_y, stride_x, stride_p, image_height, image_width,
             width, across, PADS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Where keys (y, x) of the padded image lie, in the image's buffer or the padding's."""
    at = pixels(ptr, y, x, stride_y, stride_x, WIDE)
    if PADS == GIVEN_PADS:
        wide = across * width
        right = wide - image_width
        beside = y * right + x - image_width
        below = image_height * right + (y - image_height) * wide + x
        row = tl.where(y < image_height, beside, below)
        if WIDE:
            row = row.to(tl.int64)
        at = tl.where(inside, at, pad_ptr + row * stride_p)
    return at


@triton.jit
def load_rows(at, live, FIRST: tl.constexpr, PART: tl.constexpr, HEAD: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """(rows, PART): elements FIRST … of the rows at ``at``; zeros where there is none."""
    column = FIRST + tl.arange(0, PART)
    at = at[:, None] + column[None, :]
    if FIRST + PART > HEAD:
        tile = tl.load(at, live[:, None] & (column < HEAD)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(at, live[:, None], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def load_head(at, live, HEAD: tl.constexpr, HEAD_A: tl.constexpr, HEAD_B: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """(rows, HEAD_A) and (rows, HEAD_B); the first twice where there is no rest."""
    tile = load_rows(at, live, 0, HEAD_A, HEAD, MASKED)
    rest = load_rows(at, live, HEAD_A, HEAD_B, HEAD, MASKED) if HEAD_B else tile
    return tile, rest


@triton.jit
def store_rows(at, tile, live, FIRST: tl.constexpr, PART: tl.constexpr, HEAD: tl.constexpr):
    column = FIRST + tl.arange(0, PART)
    mask = live[:, None]
    if FIRST + PART > HEAD:
        mask = mask & (column < HEAD)[None, :]
    tl.store(at[:, None] + column[None, :], tile.to(at.dtype.element_ty), mask)


@triton.jit
def store_head(at, tile, rest, live, HEAD: tl.constexpr, HEAD_A: tl.constexpr,
               HEAD_B: tl.constexpr):  # fmt: skip
    store_rows(at, tile, live, 0, HEAD_A, HEAD)
    if HEAD_B:
        store_rows(at, rest, live, HEAD_A, HEAD_B, HEAD)


@triton.jit
def load_keys(ptr, pad_ptr, y, x, inside, valid, stride_y, stride_x, stride_p, image_height,
              image_width, width, across, PADS: tl.constexpr, WIDE: tl.constexpr,
              EVEN: tl.constexpr, HEAD: tl.constexpr, HEAD_A: tl.constexpr,
              HEAD_B: tl.constexpr):  # fmt: skip
    """What keys (y, x) of the padded image hold: of the image, of its padding, or zeros.

    EVEN: all of them are loaded
    """
    at = key_rows(
        ptr, pad_ptr, y, x, inside, stride_y, stride_x, stride_p, image_height, image_width, width,
        across, PADS, WIDE,
    )  # fmt: skip
    loaded = inside if PADS == ZERO_PADS else valid
    return load_head(at, loaded, HEAD, HEAD_A, HEAD_B, not EVEN)


@triton.jit
def dot_nt(a, a_rest, b, b_rest, HEAD_B: tl.constexpr, PRECISION: tl.constexpr):
    """(rows of a, rows of b): [a | a_rest] [b | b_rest]ᵀ"""
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if HEAD_B:
        s = tl.dot(a_rest, tl.trans(b_rest), s, input_precision=PRECISION)
    return s


@triton.jit
def key_places(first, height, width, BLOCK_N: tl.constexpr, PITCH: tl.constexpr,
               LINE: tl.constexpr):  # fmt: skip
    """Lines and columns in a window of BLOCK_N keys, and which of them exist.

    PITCH: how many positions a line takes, a power of two, and first begins one; 0 for the width
    LINE: as if the window were one line
    """
    j = tl.arange(0, BLOCK_N)
    if PITCH:
        a = j // PITCH
        b = j - a * PITCH
        a += first // PITCH
        valid = (a < height) & (b < width)
    else:
        j += first
        a = tl.zeros_like(j) if LINE else j // width
        b = j - a * width
        valid = j < height * width
    return a, b, valid


@triton.jit
def keys_inside(key_y, key_x, valid, image_height, image_width, LINE: tl.constexpr):
    """Which of these keys are the image's."""
    return valid if LINE else valid & (key_y < image_height) & (key_x < image_width)


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """e or two to the power of x. Two takes one product less, e rounds once less."""
    return tl.exp(x) if NATURAL else tl.exp2(x)


@triton.jit
def further(ptr, line, stride_y, WIDE: tl.constexpr):
    """A pointer so many lines of an image on."""
    return ptr + (line.to(tl.int64) if WIDE else line) * stride_y
