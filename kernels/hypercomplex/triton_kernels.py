# SPDX-License-Identifier: Apache-2.0
"""The two passes in Triton: H in one launch, and both gradients in two.

H has n · n cells of P × Q positions each. A program has some positions and goes through cells, so
it reads each element of the weights, of H and of dH once. It writes its share of drules separately;
the second launch adds the shares up in a fixed order.
"""

import contextlib

import torch
import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.hypercomplex import costs

MAX_TERMS = 16  # rows of a program's tile of weights
CELLS = 16
BUILD_POSITIONS = 128
POSITIONS, WARPS = 32, 8  # more positions or fewer warps spill in the product over them
PROGRAMS = 1024  # about as many, where cells are so few that one program may have many tiles
SUM_ROWS, SUM_COLUMNS = 64, 16


@triton.jit
def positions(start, rows, columns, BLOCK_P: tl.constexpr):
    """Row a (int64) and column b of the positions from ``start`` on, (BLOCK_P,) each, and which of
    them exist. There are less than 2**31, and dividing in 64 bits is a call."""
    position = start + tl.arange(0, BLOCK_P)
    a = position // columns
    return a.to(tl.int64), position % columns, a < rows


@triton.jit(launch_metadata=launched(__package__, costs.build_kernel))
def build_kernel(
    rules_ptr,
    weights_ptr,
    base_ptr,
    h_ptr,
    scaling,
    terms,
    n,
    rows,
    columns,
    stride_weights,
    stride_base,
    stride_h,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """base + s · Σ_i rules_i ⊗ weights_i for BLOCK_P positions of BLOCK_C cells."""
    start = tl.program_id(0) * BLOCK_P
    a, b, live = positions(start, rows, columns, BLOCK_P)
    cell = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = cell < n * n
    at = start.to(tl.int64) + tl.arange(0, BLOCK_P)
    acc = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for i in range(0, terms):
        rule = tl.load(rules_ptr + i * n * n + cell, exists, other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + at, live, other=0.0).to(tl.float32)
        acc += rule[:, None] * weight[None, :]
        at += stride_weights
    acc *= scaling
    row = (cell // n)[:, None] * rows + a[None, :]  # int64
    column = (cell % n)[:, None] * columns + b[None, :]
    inside = exists[:, None] & live[None, :]
    if base_ptr is not None:
        acc += tl.load(base_ptr + row * stride_base + column, inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * stride_h + column, acc.to(h_ptr.dtype.element_ty), inside)


@triton.jit(launch_metadata=launched(__package__, costs.contract_kernel))
def contract_kernel(
    grad_ptr,
    rules_ptr,
    weights_ptr,
    dweights_ptr,
    partial_ptr,
    scaling,
    terms,
    n,
    rows,
    columns,
    stride_grad,
    stride_weights,
    tiles,
    ONE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dweights at ``tiles`` times BLOCK_P positions, and these positions' share of drules,
    partial (programs, terms, n · n). ONE: all cells are one block; otherwise there is one tile."""
    offs_i, cells = tl.arange(0, BLOCK_I)[:, None], n * n
    out = partial_ptr
    if partial_ptr is not None:
        out += tl.program_id(0).to(tl.int64) * terms * cells
    total = tl.zeros((BLOCK_I, BLOCK_C), tl.float32)
    for tile in range(0, tiles):
        start = (tl.program_id(0) * tiles + tile) * BLOCK_P
        a, b, live = positions(start, rows, columns, BLOCK_P)
        at = offs_i.to(tl.int64) * stride_weights + start + tl.arange(0, BLOCK_P)[None, :]
        mine = (offs_i < terms) & live[None, :]
        weights = tl.load(weights_ptr + at, mine, other=0.0).to(tl.float32)  # (BLOCK_I, BLOCK_P)
        dweights = tl.zeros((BLOCK_I, BLOCK_P), tl.float32)
        for first in range(0, cells, BLOCK_C):
            cell = first + tl.arange(0, BLOCK_C)
            row = (cell // n)[:, None] * rows + a[None, :]  # int64
            column = (cell % n)[:, None] * columns + b[None, :]
            inside = (cell < cells)[:, None] & live[None, :]
            grad = tl.load(grad_ptr + row * stride_grad + column, inside, other=0.0)
            grad = grad.to(tl.float32)  # (BLOCK_C, BLOCK_P)
            known = (offs_i < terms) & (cell < cells)[None, :]
            place = offs_i * cells + cell[None, :]  # (BLOCK_I, BLOCK_C)
            if dweights_ptr is not None:
                rule = tl.load(rules_ptr + place, known, other=0.0).to(tl.float32)
                dweights += tl.dot(rule, grad, input_precision="ieee")
            if partial_ptr is not None:
                share = tl.dot(weights, tl.trans(grad), input_precision="ieee")
                if ONE:
                    total += share
                else:
                    tl.store(out + place, share * scaling, known)
        if dweights_ptr is not None:
            dweights = (dweights * scaling).to(dweights_ptr.dtype.element_ty)
            tl.store(dweights_ptr + at, dweights, mine)
    if ONE:
        if partial_ptr is not None:
            cell = tl.arange(0, BLOCK_C)[None, :]
            known = (offs_i < terms) & (cell < cells)
            tl.store(out + offs_i * cells + cell, total * scaling, known)


@triton.jit(launch_metadata=launched(__package__))
def sum_kernel(
    partial_ptr, out_ptr, programs, entries, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr
):
    """out (entries,) = the sum of partial (programs, entries) over programs, in order."""
    entry = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    for first in range(0, programs, BLOCK_B):
        program = (first + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
        live = (program < programs) & (entry < entries)[None, :]
        total += tl.load(partial_ptr + program * entries + entry[None, :], live, other=0.0)
    total = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + entry, total, entry < entries)


def build(rules, weights, base, scaling, dtype):
    """base + s · Σ_i rules_i ⊗ weights_i in ``dtype``, (n · P, n · Q), rounded once."""
    rules, weights = rules.contiguous(), weights.contiguous()
    base = None if base is None else base.contiguous()
    (terms, n, _), (_, rows, columns) = rules.shape, weights.shape
    h = weights.new_empty(n * rows, n * columns, dtype=dtype)
    block_c = min(CELLS, triton.next_power_of_2(n * n))
    grid = (triton.cdiv(rows * columns, BUILD_POSITIONS), triton.cdiv(n * n, block_c))
    with _on(weights):
        build_kernel[grid](
            rules, weights, base, h, scaling, terms, n, rows, columns, rows * columns, n * columns,
            n * columns, BLOCK_C=block_c, BLOCK_P=BUILD_POSITIONS,
        )  # fmt: skip
    return h


def contract(grad, rules, weights, scaling, needs):
    """drules and dweights from dH (n · P, n · Q), of the parameters' dtypes; None unless needed."""
    if not any(needs):
        return None, None
    need_rules, need_weights = needs
    rules, weights = rules.contiguous(), weights.contiguous()
    (terms, n, _), (_, rows, columns) = rules.shape, weights.shape
    one = n * n <= CELLS
    blocks = triton.cdiv(rows * columns, POSITIONS)
    tiles = triton.cdiv(blocks, PROGRAMS) if one else 1
    programs, entries = triton.cdiv(blocks, tiles), terms * n * n
    drules = rules.new_empty(rules.shape) if need_rules else None
    dweights = weights.new_empty(weights.shape) if need_weights else None
    partial = rules.new_empty(programs, entries, dtype=torch.float32) if need_rules else None
    with _on(weights):
        contract_kernel[(programs,)](
            grad, rules, weights, dweights, partial, scaling, terms, n, rows, columns, n * columns,
            rows * columns, tiles, ONE=one, BLOCK_I=MAX_TERMS, BLOCK_C=CELLS, BLOCK_P=POSITIONS,
            num_warps=WARPS,
        )  # fmt: skip
        if need_rules:
            sum_kernel[(triton.cdiv(entries, SUM_COLUMNS),)](
                partial, drules, programs, entries, BLOCK_B=SUM_ROWS, BLOCK_E=SUM_COLUMNS
            )
    return drules, dweights


def _on(t):
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
