# SPDX-License-Identifier: Apache-2.0
"""``kronecker_factors`` in Triton: one launch each way.

Either launch has programs of several kinds, told apart by their number: for lora_a and for lora_b,
and for each of the three gradients. One program makes each sum, in a fixed order. Elements are
counted in 32 bits, because a 64-bit division is a call. Rows are widened before they meet a stride.
"""

import contextlib

import torch
import triton
import triton.language as tl

from samfast.kernels._common.launched import launched
from samfast.kernels.hypercomplex import costs

BLOCK = 256


@triton.jit
def part(r, n, rank):
    """Term, column of its rule, and rank of the bottleneck's columns r."""
    return r // (n * rank), r // rank % n, r % rank


@triton.jit(launch_metadata=launched(__package__, costs.factors_kernel))
def factors_kernel(
    rules_ptr,
    left_ptr,
    right_ptr,
    a_ptr,
    b_ptr,
    n,
    rank,
    rows,
    columns,
    width,
    stride_a,
    stride_b,
    a_blocks,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of lora_a, zeros written too, or after a_blocks programs of lora_b."""
    pid = tl.program_id(0)
    if pid < a_blocks:
        element = pid * BLOCK + tl.arange(0, BLOCK)
        r, c = element // (n * columns), element % (n * columns)
        term, q, j = part(r, n, rank)
        mine = (r < width) & (c // columns == q)
        at = (term * columns + c % columns) * rank + j
        a = tl.load(right_ptr + at, mine, other=0.0)
        tl.store(a_ptr + r.to(tl.int64) * stride_a + c, a.to(a_ptr.dtype.element_ty), r < width)
    else:
        element = (pid - a_blocks) * BLOCK + tl.arange(0, BLOCK)
        o, r = element // width, element % width
        term, q, j = part(r, n, rank)
        live = o < n * rows
        rule = tl.load(rules_ptr + (term * n + o // rows) * n + q, live, other=0.0)
        left = tl.load(left_ptr + (term * rows + o % rows) * rank + j, live, other=0.0)
        b = rule.to(tl.float32) * left.to(tl.float32)
        tl.store(b_ptr + o.to(tl.int64) * stride_b + r, b.to(b_ptr.dtype.element_ty), live)


@triton.jit
def sum_of_rule(pid, db_ptr, left_ptr, drules_ptr, n, rank, rows, stride_b, BLOCK: tl.constexpr):
    """Element pid of drules: over rows a and ranks j."""
    term, p, q = pid // (n * n), pid // n % n, pid % n
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rows * rank, BLOCK):
        element = first + tl.arange(0, BLOCK)
        live = element < rows * rank
        a, j = element // rank, element % rank
        at = (p * rows + a).to(tl.int64) * stride_b + (term * n + q) * rank + j
        db = tl.load(db_ptr + at, live, other=0.0).to(tl.float32)
        left = tl.load(left_ptr + term * rows * rank + element, live, other=0.0)
        total += db * left.to(tl.float32)
    tl.store(drules_ptr + pid, tl.sum(total, 0).to(drules_ptr.dtype.element_ty))


@triton.jit
def sums_of_left(
    pid, db_ptr, rules_ptr, dleft_ptr, terms, n, rank, rows, stride_b, BLOCK: tl.constexpr
):
    """BLOCK elements of dleft: over cells (p, q), by rows of cells."""
    element = pid * BLOCK + tl.arange(0, BLOCK)
    term, a, j = element // (rows * rank), element // rank % rows, element % rank
    live = term < terms
    total = tl.zeros((BLOCK,), tl.float32)
    for p in range(0, n):
        of_row = tl.zeros((BLOCK,), tl.float32)
        for q in range(0, n):
            at = (p * rows + a).to(tl.int64) * stride_b + (term * n + q) * rank + j
            db = tl.load(db_ptr + at, live, other=0.0).to(tl.float32)
            rule = tl.load(rules_ptr + (term * n + p) * n + q, live, other=0.0)
            of_row += rule.to(tl.float32) * db
        total += of_row
    tl.store(dleft_ptr + element, total.to(dleft_ptr.dtype.element_ty), live)


@triton.jit
def sums_of_right(pid, da_ptr, dright_ptr, terms, n, rank, columns, stride_a, BLOCK: tl.constexpr):
    """BLOCK elements of dright: over the blocks q that hold it."""
    element = pid * BLOCK + tl.arange(0, BLOCK)
    term, j, b = element // (rank * columns), element // columns % rank, element % columns
    live = term < terms
    total = tl.zeros((BLOCK,), tl.float32)
    for q in range(0, n):
        at = ((term * n + q) * rank + j).to(tl.int64) * stride_a + q * columns + b
        total += tl.load(da_ptr + at, live, other=0.0).to(tl.float32)
    at = (term * columns + b) * rank + j
    tl.store(dright_ptr + at, total.to(dright_ptr.dtype.element_ty), live)


@triton.jit(launch_metadata=launched(__package__, costs.factors_backward_kernel))
def factors_backward_kernel(
    da_ptr,
    db_ptr,
    rules_ptr,
    left_ptr,
    drules_ptr,
    dleft_ptr,
    dright_ptr,
    terms,
    n,
    rank,
    rows,
    columns,
    stride_a,
    stride_b,
    rule_blocks,
    left_blocks,
    BLOCK: tl.constexpr,
):
    """One element of drules, or after rule_blocks programs BLOCK of dleft, then of dright."""
    pid = tl.program_id(0)
    if pid < rule_blocks:
        if drules_ptr is not None:
            sum_of_rule(pid, db_ptr, left_ptr, drules_ptr, n, rank, rows, stride_b, BLOCK)
    elif pid < rule_blocks + left_blocks:
        if dleft_ptr is not None:
            pid -= rule_blocks
            sums_of_left(
                pid, db_ptr, rules_ptr, dleft_ptr, terms, n, rank, rows, stride_b, BLOCK
            )  # fmt: skip
    else:
        if dright_ptr is not None:
            pid -= rule_blocks + left_blocks
            sums_of_right(pid, da_ptr, dright_ptr, terms, n, rank, columns, stride_a, BLOCK)


def forward(rules, left, right, dtype):
    """lora_a (m · n · k, n · Q) and lora_b (n · P, m · n · k) in ``dtype``."""
    rules, left, right = (t.contiguous() for t in (rules, left, right))
    (terms, n, _), (_, rows, rank), columns = rules.shape, left.shape, right.shape[1]
    width = terms * n * rank
    lora_a = rules.new_empty(width, n * columns, dtype=dtype)
    lora_b = rules.new_empty(n * rows, width, dtype=dtype)
    a_blocks, b_blocks = (triton.cdiv(t.numel(), BLOCK) for t in (lora_a, lora_b))
    with _on(rules):
        factors_kernel[(a_blocks + b_blocks,)](
            rules, left, right, lora_a, lora_b, n, rank, rows, columns, width, n * columns, width,
            a_blocks, BLOCK=BLOCK,
        )  # fmt: skip
    return lora_a, lora_b


def backward(da, db, rules, left, right, needs):
    """drules, dleft and dright of their parameters' dtypes; None unless needed.

    da (m · n · k, n · Q) and db (n · P, m · n · k), None where nothing that is needed comes of it
    """
    if not any(needs):
        return None, None, None
    rules, left, right = (t.contiguous() for t in (rules, left, right))
    (terms, n, _), (_, rows, rank), columns = rules.shape, left.shape, right.shape[1]
    made = [
        t.new_empty(t.shape) if need else None
        for t, need in zip((rules, left, right), needs, strict=True)
    ]
    rule_blocks = rules.numel() if needs[0] else 0
    left_blocks, right_blocks = (
        triton.cdiv(t.numel(), BLOCK) if need else 0
        for t, need in zip((left, right), needs[1:], strict=True)
    )
    with _on(rules):
        factors_backward_kernel[(rule_blocks + left_blocks + right_blocks,)](
            da, db, rules, left, *made, terms, n, rank, rows, columns, n * columns,
            terms * n * rank, rule_blocks, left_blocks, BLOCK=BLOCK,
        )  # fmt: skip
    return made


def _on(t):
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
