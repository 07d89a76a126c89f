# SPDX-License-Identifier: Apache-2.0
"""The fold as one Triton launch and its gradient as two; see torch_path for what each computes.

One launch of the library gathers the layers' tensors first. A program has one slice, with its K in
registers. Sums over the rows of a factor stay in one program. The second launch sums over slices
in order. There are no atomics, and the bits are the same every time.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from samfast.kernels._common.launched import launched
from samfast.kernels.cobot_fold import costs

MAX_WIDTH = 32
BLOCK_R = 32
BLOCK_L = 64


@triton.jit
def slice_matrices(
    c_ptr, p_ptr, gammas_ptr, heads_ptr, s, m, width, slices, WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """λ (V,) and W (V, V) of slice s, number m of all; zeros beyond ``width``."""
    offs = tl.arange(0, WIDTH)
    inside = offs < width
    lam = tl.load(gammas_ptr + s * width + offs, inside, other=0.0).to(tl.float32)
    for start in range(0, slices, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        live = offs_l < slices
        column = tl.load(p_ptr + offs_l * slices + m, live, other=0.0).to(tl.float32)
        at = c_ptr + offs[:, None] * slices + offs_l[None, :]
        c = tl.load(at, inside[:, None] & live[None, :], other=0.0).to(tl.float32)
        lam += tl.sum(c * column[None, :], 1)
    quarter = width // 4
    row, column = offs[:, None] // quarter, offs[None, :] // quarter
    which = row ^ column
    minus = (row > 0) & ((column == 0) | (column == (row + 1) % 3 + 1))
    at = ((s * 4 + which) * quarter + offs[:, None] % quarter) * quarter + offs[None, :] % quarter
    w = tl.load(heads_ptr + at, inside[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return lam, tl.where(minus, -w, w)


@triton.jit(launch_metadata=launched(__package__, costs.fold_kernel))
def fold_kernel(
    c_ptr,
    p_ptr,
    gammas_ptr,
    heads_ptr,
    factors_ptr,
    biases_ptr,
    folded_ptr,
    shifts_ptr,
    first,
    width,
    slices,
    rows,
    stride_r,
    stride_v,
    DOWN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """F Kᵀ, or with DOWN, for F as (R, V): F K, and b K."""
    s, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lam, w = slice_matrices(
        c_ptr, p_ptr, gammas_ptr, heads_ptr, s, first + s, width, slices, WIDTH, BLOCK_L
    )
    k = lam[:, None] * w
    offs = tl.arange(0, WIDTH)
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (offs_r[:, None] < rows) & (offs[None, :] < width)
    at = s * rows * width + offs_r[:, None] * stride_r + offs[None, :] * stride_v
    f = tl.load(factors_ptr + at, inside, other=0.0).to(tl.float32)  # (BLOCK_R, WIDTH)
    right = k if DOWN else tl.trans(k)
    folded = tl.dot(f, right, input_precision="ieee")
    tl.store(folded_ptr + at, folded.to(folded_ptr.dtype.element_ty), inside)
    if DOWN:
        if block == 0:
            b = tl.load(biases_ptr + s * width + offs, offs < width, other=0.0).to(tl.float32)
            shift = tl.sum(b[:, None] * k, 0)
            at_b = shifts_ptr + s * width + offs
            tl.store(at_b, shift.to(shifts_ptr.dtype.element_ty), offs < width)


@triton.jit(launch_metadata=launched(__package__, costs.fold_backward_kernel))
def fold_backward_kernel(
    dfolded_ptr,
    dshifts_ptr,
    c_ptr,
    p_ptr,
    gammas_ptr,
    heads_ptr,
    factors_ptr,
    biases_ptr,
    dfactors_ptr,
    dbiases_ptr,
    dlam_ptr,
    dw_ptr,
    first,
    width,
    slices,
    rows,
    stride_r,
    stride_v,
    DOWN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Gradients of one slice's factor, bias, λ and W (not yet of its quarters)."""
    s = tl.program_id(0).to(tl.int64)
    lam, w = slice_matrices(
        c_ptr, p_ptr, gammas_ptr, heads_ptr, s, first + s, width, slices, WIDTH, BLOCK_L
    )
    k = lam[:, None] * w
    offs = tl.arange(0, WIDTH)
    live = offs < width
    left = tl.trans(k) if DOWN else k
    dk = tl.zeros((WIDTH, WIDTH), tl.float32)
    for start in range(0, rows, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        inside = (offs_r[:, None] < rows) & live[None, :]
        at = s * rows * width + offs_r[:, None] * stride_r + offs[None, :] * stride_v
        d = tl.load(dfolded_ptr + at, inside, other=0.0).to(tl.float32)
        f = tl.load(factors_ptr + at, inside, other=0.0).to(tl.float32)
        if DOWN:
            dk += tl.dot(tl.trans(f), d, input_precision="ieee")
        else:
            dk += tl.dot(tl.trans(d), f, input_precision="ieee")
        df = tl.dot(d, left, input_precision="ieee")
        tl.store(dfactors_ptr + at, df.to(dfactors_ptr.dtype.element_ty), inside)
    at_v = s * width + offs
    if DOWN:
        b = tl.load(biases_ptr + at_v, live, other=0.0).to(tl.float32)
        ds = tl.load(dshifts_ptr + at_v, live, other=0.0).to(tl.float32)
        dk += b[:, None] * ds[None, :]
        db = tl.sum(k * ds[None, :], 1)
        tl.store(dbiases_ptr + at_v, db.to(dbiases_ptr.dtype.element_ty), live)
    tl.store(dlam_ptr + at_v, tl.sum(dk * w, 1), live)
    at_w = (s * width + offs[:, None]) * width + offs[None, :]
    tl.store(dw_ptr + at_w, lam[:, None] * dk, live[:, None] & live[None, :])


@triton.jit(launch_metadata=launched(__package__, costs.shared_backward_kernel))
def shared_backward_kernel(
    c_ptr,
    p_ptr,
    dlam_ptr,
    dw_ptr,
    dc_ptr,
    dp_ptr,
    dheads_ptr,
    first,
    count,
    width,
    slices,
    WIDTH: tl.constexpr,
    QUARTER: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Sums the quarters' gradients of slice s and column m of dP; the last programs sum dC."""
    s = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, WIDTH)
    live = offs < width
    if s < count:
        quarter = width // 4
        offs_q = tl.arange(0, QUARTER)
        inside = (offs_q[:, None] < quarter) & (offs_q[None, :] < quarter)
        for which in tl.static_range(4):
            total = tl.zeros((QUARTER, QUARTER), tl.float32)
            for row in tl.static_range(4):
                at = (s * width + row * quarter + offs_q[:, None]) * width
                at += (row ^ which) * quarter + offs_q[None, :]
                part = tl.load(dw_ptr + at, inside, other=0.0)
                if row > 0 and ((row ^ which) == 0 or (row ^ which) == (row + 1) % 3 + 1):
                    total -= part
                else:
                    total += part
            head_at = ((s * 4 + which) * quarter + offs_q[:, None]) * quarter + offs_q[None, :]
            tl.store(dheads_ptr + head_at, total.to(dheads_ptr.dtype.element_ty), inside)
        dlam = tl.load(dlam_ptr + s * width + offs, live, other=0.0)
        for start in range(0, slices, BLOCK_L):
            offs_l = start + tl.arange(0, BLOCK_L)
            c_at = c_ptr + offs[:, None] * slices + offs_l[None, :]
            c = tl.load(c_at, live[:, None] & (offs_l[None, :] < slices), other=0.0)
            dp = tl.sum(c.to(tl.float32) * dlam[:, None], 0)
            dp_at = dp_ptr + offs_l * slices + first + s
            tl.store(dp_at, dp.to(dp_ptr.dtype.element_ty), offs_l < slices)
    else:
        offs_l = (s - count) * BLOCK_L + tl.arange(0, BLOCK_L)
        dc = tl.zeros((WIDTH, BLOCK_L), tl.float32)
        for i in range(0, count):
            dlam = tl.load(dlam_ptr + i * width + offs, live, other=0.0)
            p_at = p_ptr + offs_l * slices + first + i
            p = tl.load(p_at, offs_l < slices, other=0.0).to(tl.float32)
            dc += dlam[:, None] * p[None, :]
        dc_at = dc_ptr + offs[:, None] * slices + offs_l[None, :]
        there = live[:, None] & (offs_l[None, :] < slices)
        tl.store(dc_at, dc.to(dc_ptr.dtype.element_ty), there)


def forward(
    c: Tensor, p: Tensor, gammas: list[Tensor], heads: list[Tensor], factors: list[Tensor],
    biases: list[Tensor], first: int, down: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gathered, sizes = _gathered(c, gammas, heads, factors, biases, down)
    folded = factors[0].new_empty(len(factors), *factors[0].shape)
    shifts = biases[0].new_empty(len(biases), c.shape[1]) if down else folded.new_empty(0)
    slices, width, rows = sizes
    with _on(c):
        fold_kernel[(slices, triton.cdiv(rows, BLOCK_R))](
            c.contiguous(), p.contiguous(), *gathered, folded, shifts, first, width, p.shape[0],
            rows, *_strides(rows, width, down), DOWN=down, WIDTH=_wide(width), BLOCK_R=BLOCK_R,
            BLOCK_L=BLOCK_L,
        )  # fmt: skip
    return folded, shifts


def backward(
    dfolded: Tensor, dshifts: Tensor | None, c: Tensor, p: Tensor, gammas: list[Tensor],
    heads: list[Tensor], factors: list[Tensor], biases: list[Tensor], first: int, down: bool,
) -> list[Tensor]:  # fmt: skip
    gathered, sizes = _gathered(c, gammas, heads, factors, biases, down)
    slices, width, rows = sizes
    c, p = c.contiguous(), p.contiguous()
    layers = len(gammas)
    df = factors[0].new_empty(layers, *factors[0].shape)
    db = biases[0].new_empty(layers, width) if down else df.new_empty(0)
    dlam = df.new_empty(slices, width, dtype=torch.float32)
    dw = df.new_empty(slices, width, width, dtype=torch.float32)
    dheads = heads[0].new_empty(layers, *heads[0].shape)
    dc = c.new_empty(c.shape)
    dp = p.new_empty(p.shape) if slices == p.shape[0] else p.new_zeros(p.shape)
    with _on(c):
        fold_backward_kernel[(slices,)](
            dfolded.contiguous(), None if dshifts is None else dshifts.contiguous(), c, p,
            *gathered, df, db, dlam, dw, first, width, p.shape[0], rows,
            *_strides(rows, width, down), DOWN=down, WIDTH=_wide(width), BLOCK_R=BLOCK_R,
            BLOCK_L=BLOCK_L,
        )  # fmt: skip
        shared_backward_kernel[(slices + triton.cdiv(p.shape[0], BLOCK_L),)](
            c, p, dlam, dw, dc, dp, dheads, first, slices, width, p.shape[0], WIDTH=_wide(width),
            QUARTER=max(2, triton.next_power_of_2(width // 4)), BLOCK_L=BLOCK_L,
        )  # fmt: skip
    return [dc, dp, dlam.view(layers, -1).to(gammas[0].dtype), dheads, df, db]


def _gathered(c, gammas, heads, factors, biases, down):
    """gammas, heads, factors and biases one after another each, and (slices, V, rows)."""
    width = c.shape[1]
    lists = [gammas, heads, factors, biases] if down else [gammas, heads, factors]
    flat = torch.cat([t.reshape(-1) for tensors in lists for t in tensors])
    lengths = [len(tensors) * tensors[0].numel() for tensors in lists]
    parts = [*flat.split(lengths), *([] if down else [flat])]
    slices = len(gammas) * heads[0].shape[0]
    return parts, (slices, width, factors[0].numel() * len(factors) // (slices * width))


def _strides(rows: int, width: int, down: bool) -> tuple[int, int]:
    """From one row of a factor to the next, and from one of its V columns to the next."""
    return (1, rows) if down else (width, 1)


def _wide(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _on(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
