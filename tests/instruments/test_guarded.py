# SPDX-License-Identifier: Apache-2.0
"""Each fault that the plain interpreter forgives is planted once and caught by the guard."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402
from guarded import ORDERS, guarded  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("kernels are compiled, not interpreted, beside a GPU", allow_module_level=True)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr, MASK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASK:
        x = tl.load(x_ptr + offs + shift, offs + shift < n, other=0.0)
        tl.store(y_ptr + offs, x, offs < n)
    else:
        tl.store(y_ptr + offs, tl.load(x_ptr + offs + shift))


@triton.jit
def no_other_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + offs, offs < n), 0)
    tl.store(y_ptr, total)


@triton.jit
def same_place_kernel(y_ptr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if LANES:
        tl.store(y_ptr + offs // 2, offs.to(tl.float32))
    else:
        tl.store(y_ptr + offs, offs.to(tl.float32))


@triton.jit
def neighbour_kernel(x_ptr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + BLOCK)
    tl.store(x_ptr + offs, x)


@triton.jit
def product_kernel(x_ptr, y_ptr, stride):
    row = tl.program_id(0) + 2
    tl.store(y_ptr, tl.load(x_ptr + (row * stride) * 0))


@triton.jit
def reinterpret_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    wide_ptr = x_ptr.to(tl.pointer_type(tl.float64))
    tl.store(y_ptr + offs, tl.load(wide_ptr + offs))


@triton.jit
def atomic_kernel(y_ptr):
    tl.atomic_add(y_ptr, 1.0)


@triton.jit
def order_kernel(y_ptr, counter_ptr):
    tl.store(y_ptr + tl.program_id(0), tl.load(counter_ptr))


def caught(sentence):
    return pytest.raises(InterpreterError, match=sentence)


@pytest.mark.parametrize("order", ORDERS)
def test_a_right_kernel_passes(order):
    x, y = torch.arange(37.0), torch.zeros(37)
    with guarded(order) as guard:
        copy_kernel[(5,)](x, y, 37, 0, BLOCK=8, MASK=True)
    assert torch.equal(x, y)
    assert guard.launches == 1


def test_a_load_past_the_end():
    x, y = torch.arange(64.0)[:37], torch.zeros(40)
    with guarded(), caught("load of 3 lanes outside the tensors"):
        copy_kernel[(5,)](x, y, 37, 0, BLOCK=8, MASK=False)


def test_a_store_past_the_end():
    x, y = torch.arange(40.0), torch.zeros(64)[:37]
    with guarded(), caught("store of 3 lanes outside the tensors"):
        copy_kernel[(5,)](x, y, 37, 0, BLOCK=8, MASK=False)


def test_a_load_from_the_gap_between_rows():
    x, y = torch.zeros(4, 8)[:, :5], torch.zeros(32)
    with guarded(), caught("outside the tensors"):
        copy_kernel[(4,)](x, y, 32, 0, BLOCK=8, MASK=False)


def test_a_pointer_of_another_element_type():
    with guarded(), caught("outside the tensors"):
        reinterpret_kernel[(1,)](torch.zeros(16), torch.zeros(4, dtype=torch.float64), BLOCK=4)


def test_a_masked_load_without_other_reads_nan():
    x, y = torch.ones(8), torch.zeros(1)
    no_other_kernel[(1,)](x, y, 5, BLOCK=8)
    assert y.item() == 5.0
    with guarded():
        no_other_kernel[(1,)](x, y, 5, BLOCK=8)
    assert y.isnan().all()


def test_two_lanes_of_one_store():
    with guarded(), caught("two lanes of one store"):
        same_place_kernel[(1,)](torch.zeros(8), BLOCK=8, LANES=True)


def test_two_programs_on_one_address():
    with guarded(), caught("two programs write the same address"):
        same_place_kernel[(2,)](torch.zeros(8), BLOCK=8, LANES=False)


@pytest.mark.parametrize("order", ORDERS)
def test_a_program_that_reads_what_another_writes(order):
    with guarded(order), caught("reads what another one writes|writes what another one reads"):
        neighbour_kernel[(3,)](torch.zeros(32), BLOCK=8)


def test_int32_overflow():
    x, y = torch.zeros(1), torch.zeros(1)
    product_kernel[(1,)](x, y, 2**30)
    with guarded(), caught("int32 overflow"):
        product_kernel[(1,)](x, y, 2**30)


def test_atomics():
    with guarded(), caught("atomic"):
        atomic_kernel[(2,)](torch.zeros(1))


def test_orders_differ_and_visit_everyone():
    visited = {}
    for order in ORDERS:
        seen = []
        with guarded(order) as guard:
            visit = guard.visit

            def spy(turn, grid, visit=visit, seen=seen):
                at = visit(turn, grid)
                seen.append(int(at[0]))
                return at

            guard.visit = spy
            order_kernel[(9,)](torch.zeros(9), torch.zeros(1))
        visited[order] = seen
    assert visited["forward"] == list(range(9))
    assert visited["reverse"] == list(range(9))[::-1]
    assert sorted(visited["shuffled"]) == list(range(9))
    assert visited["shuffled"] != visited["forward"]


def test_empty_memory_is_poisoned():
    with guarded():
        for t in (torch.empty(4), torch.zeros(2).new_empty(4), torch.empty_like(torch.zeros(4))):
            assert t.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
