# SPDX-License-Identifier: Apache-2.0
"""Every backend against the reference: the error budget, odd memory, the same bits again."""

import dataclasses
from functools import partial

import pytest
import torch
from budgets import all_within_budget, assert_same_dtypes
from layouts import odd_layouts

from samfast.functional import window_attention, window_relpos_attention

from .cases import WHOLE, Case, runnable

PADDED = Case(rank=3, head_dim=32)
TURNED = Case(height=7, width=8, window=(3, 5), rank=1, turn="interleaved")
CASES = (
    Case(),
    Case(rank=None),
    PADDED,
    Case(height=5, width=9, rank=2),
    Case(height=28, width=14),
    Case(batch=1, height=24, width=48, window=(24, 24), head_dim=64),
    TURNED,
    Case(batch=1, heads=1, height=30, width=29, window=(24, 24), turn="halves"),
    dataclasses.replace(TURNED, batch=0, turn="halves"),
    Case(batch=1, height=14, width=13, window=(14, 13), head_dim=80, rank=None),
    Case(height=1, width=1, window=(1, 1), rank=None),
)
# What the C++ code does not take; torch's flash attention does, but for padding in float32.
ODD = (Case(head_dim=12, rank=2), Case(height=9, width=13, window=(9, 13), head_dim=20, rank=None))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = [str(case) for case in (CASES[1], *CASES[3:6])]


@pytest.mark.slow_on_cpu("float16", *FEW)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_budget(case, backend, dtype):
    if reason := runnable(backend):
        pytest.skip(reason)
    stock, exact = (partial(case.run, t, "reference") for t in (dtype, torch.float64))
    all_within_budget(case.run(dtype, backend), stock, exact, dtype, case.names)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", ODD, ids=str)
def test_heads_of_other_widths(case, dtype):
    test_budget(case, "torch", dtype)


@pytest.mark.slow_on_cpu(*FEW)
@pytest.mark.parametrize("case", (*CASES, *ODD), ids=str)
def test_float64_is_exact(case):
    exact = partial(case.run, torch.float64, "reference")
    all_within_budget(case.run(torch.float64, "torch"), exact, exact, torch.float64, case.names)


@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_attention_with_tables_of_zeros(backend, dtype):
    """The torch path rounds as that one does; C++ to the bit, but for zeros' signs."""
    if reason := runnable(backend):
        pytest.skip(reason)
    leaves, dout = PADDED.tensors(dtype)
    qkv, *pads = leaves
    named = dict(zip(("pad_bias", "pad_h", "pad_b"), pads, strict=True))
    zeros = [torch.zeros(27, 32, device=qkv.device) for _ in range(2)]
    with_zeros = window_relpos_attention(qkv, 2, 14, *zeros, **named, backend=backend)
    theirs = [with_zeros, *torch.autograd.grad(with_zeros, leaves, dout)]
    ours = PADDED.run(dtype, backend)
    exact = partial(PADDED.run, torch.float64, "reference")
    all_within_budget(ours, lambda: theirs, exact, dtype, PADDED.names)
    if backend == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("turn", ["", "interleaved"])
@pytest.mark.parametrize("backend", WHOLE)
def test_sources_of_the_padding_keep_their_dtype(backend, turn):
    """float32 parameters beside a float16 map, as in training; their gradients are float32."""
    if reason := runnable(backend):
        pytest.skip(reason)
    case = dataclasses.replace(PADDED, turn=turn)
    exact = partial(case.run, torch.float64, "reference")
    ours = case.run(torch.float16, backend, torch.float32)
    stock = partial(case.run, torch.float16, "reference", torch.float32)
    budget = all_within_budget(ours, stock, exact, torch.float16, case.names)
    assert_same_dtypes(ours, budget)


@pytest.mark.parametrize("turn", ["interleaved", "halves"])
def test_keys_of_the_padding_are_rotated_alone(turn):
    """As if the rows had been multiplied out and their keys rotated before; queries do not show."""
    case = dataclasses.replace(TURNED, turn=turn, rank=96)
    (qkv, bias, rows, factor), _ = case.tensors(torch.float64)
    made = (bias + rows @ factor.T).view(case.batch, -1, 3, 2, 16)
    q, k, v = (t.clone() for t in made.unbind(2))
    cos, sin = (t.double()[:, None] for t in case.turns())
    first, second = (
        (slice(0, 8), slice(8, None))
        if turn == "halves"
        else (slice(0, None, 2), slice(1, None, 2))
    )
    a, b = k[..., first].clone(), k[..., second].clone()
    k[..., first], k[..., second] = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack([q * 0, k, v], 2).flatten(2).flatten(0, 1)
    eye = torch.eye(96, dtype=torch.float64, device=qkv.device)
    plain = dataclasses.replace(case, turn="")
    theirs = partial(plain.call, (qkv, bias * 0, turned, eye), "reference")
    all_within_budget([case.call((qkv, bias, rows, factor), "torch")], lambda: [theirs()],
                      lambda: [theirs()], torch.float64)  # fmt: skip


@pytest.mark.parametrize("backend", WHOLE)
@pytest.mark.parametrize(
    "case", [PADDED, Case(height=5, width=6, window=(5, 6), rank=None)], ids=["windows", "map"]
)
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
def test_the_same_bits_again(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    first, again = (TURNED.run(torch.float32, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", WHOLE)
def test_a_map_is_a_window(backend):
    """Images that are one window each, and the same tokens as windows of one image."""
    if reason := runnable(backend):
        pytest.skip(reason)
    case = Case(batch=2, height=6, width=5, window=(6, 5), rank=None)
    (qkv,), _ = case.tensors(torch.float32)
    beside = torch.cat(list(qkv.detach()), 1)[None]
    out = window_attention(beside, 2, (6, 5), backend=backend)
    apart = case.call([qkv], backend)
    exact = partial(case.run, torch.float64, "reference")
    stock = partial(case.run, torch.float32, "reference")
    both = [torch.stack(list(out[0].split(5, 1))), apart]
    for made in both:
        all_within_budget([made], lambda: stock()[:1], lambda: exact()[:1], torch.float32, ["out"])
