# SPDX-License-Identifier: Apache-2.0
"""conv_experts' Triton kernels under the guarded interpreter, in three program orders."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from budgets import all_within_budget

from samfast.kernels._common.windows import Windows

from .problems import RESULTS, Problem, not_interpreted

if not_interpreted():
    pytest.skip(not_interpreted(), allow_module_level=True)

from guarded import ORDERS, guarded

from samfast.kernels.conv_experts import triton_kernels as kernels

PROBLEMS = [
    Problem(Windows(1, 2, 3, 3, 2), ratios=(2, 3, 5), index=(0, 1)),  # pads, unused expert
    Problem(Windows.whole(1, 17, 2), rank=1, ratios=(4,)),  # tiles with a halo
    Problem(Windows(1, 1, 2, 2, 2), ratios=(3,), depthwise=True),
]


@pytest.mark.slow_on_cpu(
    "forward", "235-reverse", "235-shuffled", "r1-4-reverse", "depthwise-shuffled"
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_kernels_under_guard(problem, order):
    dtype = torch.float32 if problem.rank == 1 else torch.float16
    stock, exact = partial(problem.literal, dtype, dtype), partial(problem.literal, torch.float64)
    with guarded(order) as guard:
        ours = problem.run(kernels, dtype)
    assert guard.launches == 3
    all_within_budget(ours, stock, exact, dtype, RESULTS)


@triton.jit
def far_rows_kernel(row_ptr, pad_ptr, sample_ptr):
    y, x = tl.arange(0, 2)[:, None], tl.arange(0, 2)[None, :]
    sample = tl.load(sample_ptr)
    row, pad, _, _ = kernels.rows_of(sample, y, x, 2, 2, 3, 3, 2, 2)
    tl.store(row_ptr + y * 2 + x, row)
    tl.store(pad_ptr + y * 2 + x, pad)


def test_rows_beyond_two_to_the_31():
    """The last window of an image: one pixel inside the image, three in its padding."""
    image = 2**29 - 1
    row, pad = torch.empty(2, 2, dtype=torch.int64), torch.empty(2, 2, dtype=torch.int64)
    with guarded():
        far_rows_kernel[(1,)](row, pad, torch.tensor([image * 4 + 3], dtype=torch.int32))
    assert row[0, 0] == image * 9 + 8
    assert pad[0, 1] == image * 7 + 2 and pad[1].tolist() == [image * 7 + 5, image * 7 + 6]
