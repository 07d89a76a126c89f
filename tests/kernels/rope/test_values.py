# SPDX-License-Identifier: Apache-2.0
"""Every backend against the literal formula, in place and in a copy, forwards and back."""

import math
from functools import partial

import pytest
import torch
from budgets import all_within_budget, within_budget
from draws import DEVICE
from torch.utils.flop_counter import FlopCounterMode

import samfast.kernels.rope.flops  # noqa: F401 - the formulas
from samfast.counters import count
from samfast.functional import axial_tables, tables_of
from samfast.kernels._common.windows import Windows
from samfast.kernels.rope import costs, engine, reference

from .cases import BACKENDS, NAMES, Case, runnable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    Case(),  # windows that do not divide
    Case(pairs="halves", window=(2, 5), parts=3),
    Case(window=None, head_dim=6, heads=5, parts=1),
    Case(1, 3, 4, 3, 80, (2, 2)),
    Case(1, 4, 2, 7, 30, (7, 1), pairs="halves"),  # a window higher than the map
]
IDS = [f"case{i}" for i in range(len(CASES))]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := runnable(request.param):
        pytest.skip(reason)
    return request.param


@pytest.mark.slow_on_cpu(
    "triton-case1", "triton-case2", "triton-case3", "triton-case4", "triton-case0-float16"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=[str(dtype)[6:] for dtype in DTYPES])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_values(backend, case, dtype):
    """Result and gradient."""
    check(case, dtype, backend)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float64(case):
    """Which only torch takes."""
    check(case, torch.float64, "torch")


def check(case, dtype, backend):
    ours = case.run(dtype, backend)
    assert [t.dtype for t in ours] == [dtype, dtype]
    stock, exact = (partial(case.run, t, "reference") for t in (dtype, torch.float64))
    all_within_budget(ours, stock, exact, dtype, NAMES)


@pytest.mark.parametrize("case", CASES[:2], ids=["interleaved", "halves"])
def test_the_reference_is_the_formula(case):
    """Pair by pair, of numbers of Python."""
    qkv, _ = case.tensors(torch.float64)
    cos, sin = case.tables(torch.float64)
    made = case.call(qkv, "reference").unflatten(3, (3, case.heads, case.head_dim))
    given = qkv.unflatten(3, (3, case.heads, case.head_dim))
    windows, half = case.windows, case.head_dim // 2
    for image, y, x, part, head in torch.cartesian_prod(*map(torch.arange, given.shape[:5])):
        row = (y % windows.height) * windows.width + x % windows.width
        features = given[image, y, x, part, head].tolist()
        expected = list(features)
        for i in range(half if part < case.parts else 0):
            first, second = (i, i + half) if case.halves else (2 * i, 2 * i + 1)
            a, b, c, s = features[first], features[second], cos[row, i].item(), sin[row, i].item()
            expected[first], expected[second] = a * c - b * s, b * c + a * s
        ours = made[image, y, x, part, head].tolist()
        assert all(map(partial(math.isclose, abs_tol=1e-15), ours, expected))


def packed(case, dtype):
    return case.tensors(dtype)[0].unflatten(3, (3, case.heads, case.head_dim))


def views(case, dtype):
    """Buffers, and the views of them that are rotated: of packed qkv, of q alone, and odd ones."""
    qkv = packed(case, dtype)
    yield qkv, qkv[:, :, :, :2]
    q = qkv[:, :, :, :1].contiguous()
    yield q, q
    heads_first = qkv.permute(3, 0, 4, 1, 2, 5).contiguous()  # (3, B, heads, H, W, head_dim)
    yield heads_first, heads_first.permute(1, 3, 4, 0, 2, 5)[:, :, :, 1:]
    gaps = qkv.new_full((*qkv.shape[:5], case.head_dim + 3), float("nan"))
    gaps[..., 1:-2] = qkv
    yield gaps, gaps[..., 1:-2]


@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forth", "back"])
def test_in_place(backend, pairs, inverse):
    """The numbers of the rotated copy, in the memory that was given; nothing beside it changes."""
    case = Case(1, 2, 3, 2, 6, (2, 2), pairs)
    cos, sin = case.tables()
    for dtype in (torch.float32, torch.bfloat16):
        for buffer, t in views(case, dtype):
            before, copy, where = t.clone(), buffer.clone(), t.data_ptr()
            engine.rotate_(backend, t, cos, sin, case.windows, case.halves, inverse)
            assert t.data_ptr() == where and not torch.equal(t, before)

            def rotated(dtype, given=before):
                tables = (table.to(torch.promote_types(dtype, table.dtype)) for table in (cos, sin))
                return reference.rotate(
                    given.to(dtype), *tables, case.windows, case.halves, inverse
                )

            within_budget(t, partial(rotated, dtype), partial(rotated, torch.float64), dtype)
            t.copy_(before)
            assert torch.equal(buffer.nan_to_num(7.0), copy.nan_to_num(7.0))


def test_in_place_is_what_the_operator_gives(backend):
    """The same bits, and the last third untouched."""
    for pairs in ("interleaved", "halves"):
        case = Case(pairs=pairs)
        qkv, _ = case.tensors(torch.bfloat16)
        out = case.call(qkv, backend)
        assert torch.equal(out[..., -16:], qkv[..., -16:])
        t = qkv.clone().unflatten(3, (3, case.heads, case.head_dim))[:, :, :, :2]
        engine.rotate_(backend, t, *case.tables(), case.windows, case.halves, False)
        assert torch.equal(t, out.unflatten(3, (3, case.heads, case.head_dim))[:, :, :, :2])


def test_from_one_memory_to_another(backend):
    """As they lie apart in every dimension; what is read stays."""
    case = Case(2, 2, 3, 2, 6, (2, 2))
    x, rest = packed(case, torch.float32), (*case.tables(), case.windows, case.halves, False)
    other = x.permute(4, 3, 1, 2, 0, 5).contiguous()  # (heads, 3, H, W, B, head_dim)
    out = torch.zeros_like(other).permute(4, 2, 3, 1, 0, 5)
    path, before = engine.path_of(backend, x), x.clone()
    path.rotate(x, out, *rest)
    assert torch.equal(x, before)
    path.rotate(other.permute(4, 2, 3, 1, 0, 5), x, *rest)
    assert torch.equal(x, out) and not torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_forth_and_back_is_where_it_began(backend, dtype):
    """By the real angles of the model."""
    case = Case(1, 5, 5, 2, 16, (3, 3))
    tables = [t.to(DEVICE) for t in axial_tables(3, 3, 16)]
    t = packed(case, dtype)

    def there_and_back(rotate):
        made = rotate(t, False)
        assert not torch.equal(made, t)
        return rotate(made, True)

    def ours(t, inverse):
        t = t.clone()
        engine.rotate_(backend, t, *tables, case.windows, False, inverse)
        return t

    def stock(t, inverse):
        return reference.rotate(t, *tables, case.windows, False, inverse)

    exact = partial(torch.mul, t.double(), 1.0)
    within_budget(there_and_back(ours), partial(there_and_back, stock), exact, dtype)


@pytest.mark.slow_on_cpu("triton")
def test_tables_in_any_memory(backend):
    """Parts of complex numbers, every other column, columns that lie as rows, one row for all."""
    case = Case()
    cos, sin = case.tables()
    qkv, _ = case.tensors(torch.float32)
    expected = case.call(qkv, backend, (cos, sin))
    turned = [t.t().contiguous().t() for t in (cos, sin)]
    twice = tables_of(cos.repeat_interleave(2, 1)[None], sin.repeat_interleave(2, 1)[None])
    for tables in (tables_of(torch.complex(cos, sin)), twice, turned):
        assert not all(t.is_contiguous() for t in tables)
        assert torch.equal(case.call(qkv, backend, tables), expected)
    one = [t[:1].expand_as(t) for t in (cos, sin)]
    dense = [t.contiguous() for t in one]
    assert torch.equal(case.call(qkv, backend, one), case.call(qkv, backend, dense))


def test_bits_do_not_depend_on_the_number_of_threads():
    if reason := runnable("cpu"):
        pytest.skip(reason)
    case, threads, runs = Case(1, 40, 33, 4, 32, (14, 14)), torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            runs.append(case.run(torch.bfloat16, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_launches_and_flop(backend):
    """One launch in place; a copy of the last third in addition where the result is a copy."""
    case = Case()
    qkv, dout = case.tensors(torch.float32)
    t, tables = packed(case, torch.float32)[:, :, :, :2], case.tables()
    stages = costs.stages(2 * 3 * 5, 2 * 3, 2, 8, 4)
    flops = 6 * (2 * 3 * 5) * (2 * 2) * 4  # of tokens, heads of q and k, pairs
    assert [stage.flops for stage in stages] == [flops, flops]
    place = count(lambda: engine.rotate_(backend, t, *tables, case.windows, False, False))
    copy = count(lambda: case.call(qkv, backend, tables))
    assert place.total_syncs == copy.total_syncs == 0
    if backend != "torch":
        assert place.total_launches == 1 and copy.total_launches == 2
        assert place.bytes == stages[0].bytes
        assert place.flops == (flops if backend == "triton" else 0)
    with FlopCounterMode(display=False) as counter:
        out = case.call(qkv.requires_grad_(), backend)
        torch.autograd.grad(out, qkv, dout)
    assert counter.get_total_flops() == 2 * flops


def test_nothing_to_rotate(backend):
    case = Case(batch=0)
    assert case.run(torch.float32, backend)[0].shape == (0, 3, 5, 48)
    t = torch.empty(0, 3, 5, 2, 2, 8, device=DEVICE)
    engine.rotate_(backend, t, *case.tables(), Windows(0, 3, 5, 2, 3), False, False)
