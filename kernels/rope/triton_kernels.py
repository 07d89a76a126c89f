# SPDX-License-Identifier: Apache-2.0
"""The rotation as one Triton launch, in place or from one tensor to another.

A program has a token and BLOCK_R of its rows. Rows are the heads of q and k; they share the token's
row of the tables. A program reads everything that it writes before it writes. A token's place in
its window is index arithmetic on the program's number.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from samfast.kernels._common.launched import launched
from samfast.kernels._common.windows import Windows
from samfast.kernels.rope import costs

MOST = 2**31 - 1  # programs of a grid
MAX_HEAD = 1024
ELEMENTS = 2048  # of a program's tile: 16 for each thread, 32 bytes of bfloat16


@triton.jit
def token(ptr, image, y, x, stride_b, stride_y, stride_x):
    return ptr + image * stride_b + y * stride_y + x * stride_x


@triton.jit(launch_metadata=launched(__package__, costs.rotate_kernel))
def rotate_kernel(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    image_height,
    image_width,
    height,
    width,
    rows,
    heads,
    stride_xb,
    stride_xy,
    stride_xx,
    stride_xn,
    stride_xh,
    stride_ob,
    stride_oy,
    stride_ox,
    stride_on,
    stride_oh,
    stride_cl,
    stride_cp,
    stride_sl,
    stride_sp,
    HALVES: tl.constexpr,
    INVERSE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = x rotated; rows: parts · heads of a token; one program per token and BLOCK_R rows."""
    blocks = tl.cdiv(rows, BLOCK_R)
    number = tl.program_id(0) // blocks
    block = tl.program_id(0) - number * blocks
    line = number // image_width
    column = number - line * image_width
    image = line // image_height
    y = line - image * image_height
    position = ((y % height) * width + column % width).to(tl.int64)
    image, y, column = image.to(tl.int64), y.to(tl.int64), column.to(tl.int64)

    offs_p = tl.arange(0, BLOCK_P)
    known = offs_p < PAIRS
    wide_p = offs_p.to(tl.int64)
    cos = tl.load(cos_ptr + position * stride_cl + wide_p * stride_cp, known, other=0.0)
    sin = tl.load(sin_ptr + position * stride_sl + wide_p * stride_sp, known, other=0.0)
    cos, sin = cos[None, :], (-sin if INVERSE else sin)[None, :]  # (1, BLOCK_P)

    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    live = (row < rows)[:, None]
    part, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    x_at = token(x_ptr, image, y, column, stride_xb, stride_xy, stride_xx)
    x_at = (x_at + part * stride_xn + head * stride_xh)[:, None]
    out_at = token(out_ptr, image, y, column, stride_ob, stride_oy, stride_ox)
    out_at = (out_at + part * stride_on + head * stride_oh)[:, None]
    kind = out_ptr.dtype.element_ty
    if HALVES:
        inside = live & known[None, :]
        a = tl.load(x_at + offs_p[None, :], inside, other=0.0).to(tl.float32)
        b = tl.load(x_at + PAIRS + offs_p[None, :], inside, other=0.0).to(tl.float32)
        tl.store(out_at + offs_p[None, :], (a * cos - b * sin).to(kind), inside)
        tl.store(out_at + PAIRS + offs_p[None, :], (b * cos + a * sin).to(kind), inside)
    else:
        offs = tl.arange(0, 2 * BLOCK_P)
        inside = live & (offs < 2 * PAIRS)[None, :]
        x = tl.load(x_at + offs[None, :], inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_R, BLOCK_P, 2)))  # (BLOCK_R, BLOCK_P) each
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        turned = tl.reshape(turned, (BLOCK_R, 2 * BLOCK_P))
        tl.store(out_at + offs[None, :], turned.to(kind), inside)


def missing(t: Tensor) -> str | None:
    """None when the kernel takes this call, or the sentence that says why not."""
    tokens, rows, head_dim = t.shape[:3].numel(), t.shape[3] * t.shape[4], t.shape[5]
    if head_dim > MAX_HEAD:
        return f"head_dim {head_dim} is above {MAX_HEAD}, the widest tile"
    programs = tokens * triton.cdiv(rows, _blocks(rows, head_dim)["BLOCK_R"])
    if programs > MOST:
        return f"{programs} programs are more than one grid holds"
    return None


def rotate(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, windows: Windows, halves: bool, inverse: bool
) -> None:
    if x.numel() == 0:
        return
    x = x if x.stride(5) == 1 else x.contiguous()
    tokens, rows, head_dim = x.shape[:3].numel(), x.shape[3] * x.shape[4], x.shape[5]
    block = _blocks(rows, head_dim)
    with _on(x):
        rotate_kernel[(tokens * triton.cdiv(rows, block["BLOCK_R"]),)](
            x, out, cos, sin, *windows[1:], rows, x.shape[4], *x.stride()[:5], *out.stride()[:5],
            *cos.stride(), *sin.stride(), HALVES=halves, INVERSE=inverse, PAIRS=head_dim // 2,
            **block, num_warps=4,
        )  # fmt: skip


def _blocks(rows: int, head_dim: int) -> dict:
    """Pairs and rows of a program's tile."""
    block_p = max(2, triton.next_power_of_2(head_dim // 2))
    most = max(1, ELEMENTS // (2 * block_p))
    return {"BLOCK_P": block_p, "BLOCK_R": min(most, triton.next_power_of_2(max(1, rows)))}


def _on(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
