# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels under the guarded interpreter, in three program orders and far out."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from budgets import all_within_budget

from .cases import NAMES, Case, literal, runnable

if runnable("triton") or torch.cuda.is_available():
    reason = runnable("triton") or "kernels are compiled, not interpreted, beside a GPU"
    pytest.skip(reason, allow_module_level=True)

from guarded import ORDERS, guarded

from samfast.kernels.task_core import triton_kernels


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    "case",
    [
        Case(shape=(3, 70), ranks=(40, 5, 3), task=(2, 0, 2)),  # two blocks of a core's rows
        pytest.param(Case(shape=(2, 33), ranks=(3, 64, 17), task=1), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.id,
)
def test_every_order_gives_the_same_bits(case):
    dtype, runs = torch.float16, []
    for order in ORDERS:
        with guarded(order) as guard:
            runs.append(case.run(dtype, "triton", torch.float32))
        assert guard.launches == 4  # cores and product, in both directions
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    stock, exact = (
        partial(literal, case, dtype, torch.float32),
        partial(literal, case, torch.float64),
    )
    all_within_budget(runs[0], stock, exact, dtype, NAMES)


def test_a_task_that_is_not_there():
    """Rows of NaN, and nothing in the gradient of any core."""
    h, dz = torch.randn(12, 4), torch.randn(12, 3)
    m = torch.randn(2, 4, 3).expand(2, -1, -1, -1)
    task = torch.tensor([0, 2, -1])
    z = triton_kernels.product(h, m, task)
    dh, dm = triton_kernels.product_backward(dz, h, m, task, (True, True))
    assert z[4:].isnan().all() and dh[4:].isnan().all()
    good = triton_kernels.product_backward(dz[:4], h[:4], m, task[:1], (True, True))
    assert torch.equal(dh[:4], good[0]) and torch.equal(dm.sum(0), good[1].sum(0))
    assert z[:4].isfinite().all() and not dm[:, 1].any()


def test_only_what_is_wanted():
    h, dz = torch.randn(40, 4), torch.randn(40, 3)
    m = torch.randn(2, 4, 3).expand(2, -1, -1, -1)
    given = dz, h, m, torch.tensor([1, 0])
    dh, dm = triton_kernels.product_backward(*given, (True, True))
    alone, none = triton_kernels.product_backward(*given, (True, False))
    assert none is None and torch.equal(alone, dh)
    none, alone = triton_kernels.product_backward(*given, (False, True))
    assert none is None and torch.equal(alone, dm)
    assert triton_kernels.product_backward(*given, (False, False)) == (None, None)


def test_more_columns_of_a_task_factor_than_a_block():
    cores, factors = torch.randn(2, 3, 50, 20), torch.randn(2, 3, 20)
    dm = torch.randn(2, 4, 3, 3, 50)

    def by_autograd(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (cores, factors)]
        m = torch.einsum("labv,ltv->ltab", *leaves)
        return [m.detach(), *torch.autograd.grad(m, leaves, dm.to(dtype).sum(1))]

    made = [triton_kernels.fold(cores, factors), *triton_kernels.fold_backward(dm, cores, factors)]
    stock, exact = (partial(by_autograd, t) for t in (torch.float32, torch.float64))
    all_within_budget(made, stock, exact, torch.float32, ("m", "dcores", "dfactors"))


# Offsets beyond 2**31 elements on a CPU: virtual memory of which a few pages are touched. Of each
# entry only the first tile is looked at, so that two programs reach two entries far apart.
FAR = """
import torch
torch.manual_seed(0)
from guarded import guarded
from samfast.kernels.task_core import triton_kernels as kernels

far = 2**31  # elements between two entries, and between the cores of two tasks
last = far // 256
stores = [torch.empty(far + 512, dtype=torch.float16) for _ in range(3)]
cores = torch.empty(far + 256)

def wide(store, like=None):
    # two entries of 32 rows, or two cores
    made = store.as_strided((2, 32 if store is not cores else 16, 16), (far, 16, 1))
    return made if like is None else made.copy_(like)

h, dz = torch.randn(2, 32, 16).half(), torch.randn(2, 32, 16).half()
m, task = torch.randn(2, 16, 16), torch.tensor([0, 1])
sizes = dict(BLOCK_M=32, BLOCK_A=16, BLOCK_B=16)
out = wide(stores[2])
near_h, near_dz = h.view(64, 16), dz.view(64, 16)
given = m[None], task
with guarded(poison=False):
    far_task = torch.tensor([0, last])
    far_m, each = wide(cores, m), far // 16
    kernels.product_kernel[(2,)](
        wide(stores[0], h), far_m, far_task, out, each, 1, last + 1, 16, 16, **sizes
    )
    assert torch.equal(out.reshape(64, 16), kernels.product(near_h, *given))
    dh, dm = kernels.product_backward(near_dz, near_h, *given, (True, True))
    tensors = wide(stores[1], dz), wide(stores[0], h)
    kernels.product_backward_kernel[(2,)](
        *tensors, far_m, far_task, out, None, 0, 1, each, 2, 1, last + 1, 16, 16, BLOCK_C=16,
        **sizes,
    )
    assert torch.equal(out.reshape(64, 16), dh)
    made = torch.empty(1, 2, 16, 16)
    kernels.product_backward_kernel[(2,)](
        *tensors, m, task, None, made, 2, 1, each, 2, 1, 2, 16, 16, BLOCK_C=16, **sizes
    )
    assert torch.equal(made, dm)
print("equal")
"""


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31():
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    command = [sys.executable, "-c", FAR]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr
