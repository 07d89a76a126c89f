# SPDX-License-Identifier: Apache-2.0
"""Every backend against the reference: the error budget, odd memory, the same bits again."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget, assert_same_dtypes
from draws import DEVICE
from layouts import odd_layouts

from samfast.functional import relpos_attention, window_relpos_attention

from .cases import WHOLE, MapCase, WindowCase, runnable

CASES = (
    MapCase(),
    MapCase(batch=1, height=14, width=14, head_dim=64),
    MapCase(batch=1, height=5, width=37, head_dim=80),
    MapCase(height=1, width=1),
    MapCase(batch=0),
    MapCase(height=6, width=7, head_dim=48, tables=(15, 9)),
    WindowCase(),
    WindowCase(rank=None),
    WindowCase(rank=3, head_dim=32),
    WindowCase(height=5, width=9, rank=2),
    WindowCase(height=28, width=14),
    WindowCase(height=7, width=8, window=(3, 5), rank=1),
    WindowCase(batch=0, rank=2),
)
LARGE = MapCase(batch=1, heads=1, height=64, width=64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.slow_on_cpu("torch-float16")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_budget(case, backend, dtype):
    if reason := runnable(backend):
        pytest.skip(reason)
    stock, exact = (partial(case.run, t, "reference") for t in (dtype, torch.float64))
    ours = case.run(dtype, backend)
    all_within_budget(ours, stock, exact, dtype, case.names)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("backend", WHOLE)
def test_a_map_of_sam(backend):
    """Each of float16's products over it takes long on a CPU."""
    for dtype in DTYPES if DEVICE.type == "cuda" else (torch.float32, torch.bfloat16):
        test_budget(LARGE, backend, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float64_is_exact(case):
    exact = partial(case.run, torch.float64, "reference")
    all_within_budget(case.run(torch.float64, "torch"), exact, exact, torch.float64, case.names)


@pytest.mark.parametrize("backend", WHOLE)
def test_tables_keep_their_dtype(backend):
    """float32 tables beside a float16 map, as in training; their gradients come in float32."""
    if reason := runnable(backend):
        pytest.skip(reason)
    for case in (MapCase(), WindowCase(rank=2)):
        exact = partial(case.run, torch.float64, "reference")
        ours = case.run(torch.float16, backend, torch.float32)
        stock = partial(case.run, torch.float16, "reference", torch.float32)
        budget = all_within_budget(ours, stock, exact, torch.float16, case.names)
        assert_same_dtypes(ours, budget)


@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize("case", [MapCase(), WindowCase(rank=2)], ids=["map", "windows"])
def test_odd_memory(case, backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    leaves, dout = case.tensors(torch.float32)
    expected = case.run(torch.float32, backend)
    layouts = zip(*(odd_layouts(t.detach()) for t in (*leaves, dout)), strict=True)
    for *odd, odd_dout in layouts:
        odd = [t.requires_grad_() for t in odd]
        out = case.call(odd, backend)
        grads = torch.autograd.grad(out, odd, odd_dout)
        assert all(torch.equal(a, b) for a, b in zip([out, *grads], expected, strict=True))


@pytest.mark.parametrize("backend", WHOLE)
def test_packed_qkv_as_it_lies(backend):
    """Views of one packed tensor give what separate tensors give."""
    if reason := runnable(backend):
        pytest.skip(reason)
    case = MapCase()
    leaves, dout = case.tensors(torch.float32)
    packed = torch.stack([t.detach().movedim(1, 3) for t in leaves[:3]], 3).requires_grad_()
    tables = leaves[3:]
    out = relpos_attention(*packed.permute(3, 0, 4, 1, 2, 5), *tables, backend=backend)
    grad, *table_grads = torch.autograd.grad(out, [packed, *tables], dout)
    expected = case.run(torch.float32, backend)
    made = [out, *grad.permute(3, 0, 4, 1, 2, 5), *table_grads]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    whole = window_relpos_attention(packed.flatten(3), 2, (9, 13), *tables, backend=backend)
    assert torch.equal(whole.unflatten(3, (2, -1)).movedim(3, 1), out)


@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize("case", [MapCase(), WindowCase(rank=2)], ids=["map", "windows"])
def test_the_same_bits_again(case, backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    first = case.run(torch.float32, backend)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            again = case.run(torch.float32, backend)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_not_finite_spreads_as_in_the_reference(backend, value):
    if reason := runnable(backend):
        pytest.skip(reason)
    case = WindowCase(rank=2)
    for place in (0, 3, 4):  # qkv, the padding's bias and rows
        leaves, _ = case.tensors(torch.float32)
        spoilt = [t.detach().clone() for t in leaves]
        spoilt[place].view(-1)[-1 if place == 3 else 7] = value
        ours, stock = case.call(spoilt, backend), case.call(spoilt, "reference")
        assert torch.equal(ours.isfinite(), stock.isfinite())
        assert not ours.isfinite().all() or stock.isfinite().all()
