# SPDX-License-Identifier: Apache-2.0
"""lora_linear's Triton kernels under the guarded interpreter, in three program orders."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from budgets import all_within_budget

from .cases import NAMES, Case, runnable

if runnable("triton") or torch.cuda.is_available():
    reason = runnable("triton") or "kernels are compiled, not interpreted, beside a GPU"
    pytest.skip(reason, allow_module_level=True)

from guarded import ORDERS, guarded

CASES = [
    Case(shape=(150, 33), out=140, rank=3),
    Case(shape=(3, 70, 20), out=48, rank=5, slices=((0, 16), (32, 48)), dropout=0.3),
    Case(shape=(70, 24), out=30, rank=4, slices=((0, 10), (10, 20)), shared=True, bias=False),
]


@pytest.mark.slow_on_cpu("float16", "forward", "reverse")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernels_under_guard(case, dtype, order):
    stock, exact = (partial(case.run, t, "reference") for t in (dtype, torch.float64))
    with guarded(order) as guard:
        ours = case.run(dtype, "triton")
    assert guard.launches == 6  # beside the two matrix products
    all_within_budget(ours, stock, exact, dtype, NAMES)


FAR_ROWS = """
import sys
import torch
sys.path.insert(0, "tests")
from guarded import guarded
from samfast.kernels.lora_linear import triton_kernels as kernels
from samfast.kernels.lora_linear.engine import Slices

far = 2**30 + 16  # elements between rows: the third row starts beyond 2**31
store = torch.empty(2 * far + 1024, dtype=torch.float16)  # virtual until touched

def spread(t):
    wide = store.as_strided(t.shape, (far, 1))
    wide.copy_(t)
    return wide

def draw(*shape, dtype=torch.float16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)

x, a, b = draw(3, 48), draw(2, 48, dtype=torch.float32), draw(64, 2, dtype=torch.float32)
y, dh, layout = draw(3, 64), draw(3, 2), Slices((), b, False)
other = torch.empty(2 * far + 64, dtype=torch.float16)
dh_far = other.as_strided(dh.shape, (far, 1))
dh_far.copy_(dh)
seed = torch.tensor([5])
with guarded(poison=False):
    assert torch.equal(kernels.down(spread(x), a, 0.0, None), kernels.down(x, a, 0.0, None))
    near = y.clone()
    kernels.up_(near, dh, b, 0.5, layout)
    wide = spread(y)
    kernels.up_(wide, dh_far, b, 0.5, layout)
    assert torch.equal(wide, near)
    pairs = zip(
        kernels.up_backward(spread(y), dh_far, b, 0.5, layout),
        kernels.up_backward(y, dh, b, 0.5, layout),
        strict=True,
    )
    assert all(torch.equal(far_one, near_one) for far_one, near_one in pairs)
    for p in (0.0, 0.3):
        da = kernels.down_backward_(None, dh_far, spread(x), a, p, seed)
        assert torch.equal(da, kernels.down_backward_(None, dh, x, a, p, seed))

# What the launchers make or take contiguous is reached by launches of a few programs out of many.
tiles = dict(PRECISION="ieee", BLOCK_M=32, BLOCK_N=32, BLOCK_R=16)

def dz_partials(part, tokens):
    # two blocks of columns; the second one's partials start tokens * rank elements further on
    kernels.up_backward_kernel[(1, 2)](
        y, None, b, part, None, tokens, 64, 2, 32, 64, y.stride(0), 0, 0, 0, 0, 0.5,
        OWN=False, NEED_DB=False, **tiles,
    )
    return part.clone()

def dz_sum(part, tokens):
    # one block of 1024 elements, of three parts
    dz = torch.empty(1024)
    kernels.reduce_kernel[(1,)](
        part, dz, tokens, 3, 1 if tokens == 1024 else far, 1, 1, *3 * [None, None, 0, 0],
        HAS_DZ=True, GRADS=0, BLOCK=1024,
    )
    return dz

def dx_update(dx, columns):
    # the first block of columns of 17 rows
    kernels.down_backward_kernel[(1, 1)](
        dx, rows, None, row, None, None, 17, columns, 1, 32, 0, 1, 0, 1.0,
        NEED_DX=True, NEED_DA=False, DROPOUT=False, **tiles,
    )
    return dx.clone()

rows, row, start, parts = draw(17, 1), draw(1, 32), draw(17, 32), draw(3, 1024)
y = draw(32, 64)
with guarded(poison=False):
    near = dz_partials(torch.zeros(2, 32, 2, dtype=torch.float16), 32)
    wide = store.as_strided((2, 32, 2), (2 * far, 2, 1)).zero_()
    assert torch.equal(dz_partials(wide, far), near)
    assert near.count_nonzero() == near.numel()
    wide = store.as_strided((3, 1024), (far, 1)).copy_(parts)
    assert torch.equal(dz_sum(wide, far), dz_sum(parts, 1024))
    columns = 2**27 + 16  # the last of 17 rows starts beyond 2**31
    wide = store.as_strided((17, 32), (columns, 1)).copy_(start)
    assert torch.equal(dx_update(wide, columns), dx_update(start.clone(), 32))
print("equal")
"""


@pytest.mark.slow_on_cpu
def test_offsets_beyond_two_to_the_31():
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", FAR_ROWS]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr
