# SPDX-License-Identifier: Apache-2.0
"""bfloat16 in the interpreter: numbers as torch has them, by itself wrong."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("kernels are compiled, not interpreted, beside a GPU", allow_module_level=True)

BLOCK = 16


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def product_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, tl.where(x < y, x * y, x + y))


@triton.jit
def sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, y, x.numel())
    return y


def test_rounds_to_the_nearest_even():
    """Ties, what carries into the exponent, the largest, the smallest, infinities and NaN."""
    middles = np.array([0x3F808000, 0x3F818000, 0x3FFF8000, 0x7F7FFFFF, 0x00018000, 0xBF808001])
    rest = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.0e38, 1e-40, -1.5, 7.0, 1])
    x = torch.cat([torch.from_numpy(middles.astype(np.uint32).view(np.float32)), rest])
    assert torch.equal(cast(x, torch.bfloat16).view(torch.int16), x.bfloat16().view(torch.int16))
    exact = x.bfloat16()
    assert torch.equal(
        cast(exact, torch.float32).view(torch.int32), exact.float().view(torch.int32)
    )


def test_whole_numbers():
    x = torch.arange(-8, 8, dtype=torch.int32)
    assert torch.equal(cast(x, torch.bfloat16), x.bfloat16())


def test_products_are_of_the_numbers():
    x, y = (4 * draw(2, BLOCK, BLOCK, dtype=torch.float32)).round().bfloat16()  # exact sums
    out = torch.empty(BLOCK, BLOCK)
    product_kernel[(1,)](x, y, out, BLOCK)
    assert torch.equal(out, x.float() @ y.float())


def test_arithmetic_rounds_each_operation_once():
    x, y = draw(2, BLOCK)
    out = torch.empty_like(x)
    arithmetic_kernel[(1,)](x, y, out, BLOCK)
    assert torch.equal(out, torch.where(x < y, x * y, x + y))


def test_reductions_are_refused():
    with pytest.raises(InterpreterError, match="a reduction of bfloat16"):
        sum_kernel[(1,)](draw(BLOCK), torch.empty(1), BLOCK)
