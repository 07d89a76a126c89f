# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that the offline gate must refuse, as a module of launches, and one it may not."""

import torch
import triton
import triton.language as tl

from benchmarks.offline import recording


@triton.jit
def spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A product too wide for one warp."""
    offs = tl.arange(0, BLOCK)
    at = offs[:, None] * BLOCK + offs[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x).to(tl.bfloat16))


@triton.jit
def atomic_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A sum in no fixed order."""
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


@triton.jit
def crowded_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    """Six stages of two 128 x 128 tiles: more shared memory than a block may have."""
    offs = tl.arange(0, BLOCK)
    at = offs[:, None] * BLOCK + offs[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(0, rows):
        x = tl.load(x_ptr + i * BLOCK * BLOCK + at)
        y = tl.load(y_ptr + i * BLOCK * BLOCK + at)
        acc += tl.dot(x, y)
    tl.store(y_ptr + at, acc.to(tl.bfloat16))


@triton.jit
def narrowed_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """An exact product of float32, for which sm_100 is given its TF32 unit all the same."""
    offs = tl.arange(0, BLOCK)
    at = offs[:, None] * BLOCK + offs[None, :]
    quarter = at.reshape(BLOCK * BLOCK // 4, 4).sum(1).reshape(BLOCK, BLOCK // 4)
    mask = tl.reshape(tl.join(tl.join(quarter, quarter), tl.join(quarter, quarter)), BLOCK, BLOCK)
    x = tl.where(mask > 5, tl.load(x_ptr + at), 0.0)
    product = tl.dot(x, tl.load(y_ptr + at), input_precision="ieee")
    tl.store(y_ptr + at, product)


@triton.jit
def refused_kernel(x_ptr, BLOCK: tl.constexpr):
    """Not even Triton compiles a range of three."""
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


@triton.jit
def clean_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, offs < n, other=0.0) * 2, offs < n)


def registered(quick):
    x = torch.empty(128, 128, device="meta", dtype=torch.bfloat16)
    y = torch.empty(128, device="meta")
    with recording() as faults:
        spilling_kernel[(1,)](x, x, BLOCK=128, num_warps=1)
        atomic_kernel[(1,)](y, y, BLOCK=128)
        crowded_kernel[(1,)](x, x, 9, BLOCK=128, num_warps=8, num_stages=6)
        refused_kernel[(1,)](y, BLOCK=3)
    yield "faults", faults
    if not quick:
        with recording() as narrowed:
            narrowed_kernel[(1,)](x.float(), x.float(), BLOCK=64)
        yield "narrowed", narrowed
    with recording() as sound:
        clean_kernel[(1,)](y, 100, BLOCK=128)
        clean_kernel[(2,)](y, 110, BLOCK=128)  # the same code
        clean_kernel[(1,)](y, 1, BLOCK=128)  # a constant
        clean_kernel[(1,)](y[1:], 100, BLOCK=128)  # at an odd place in memory
    yield "sound", sound
