# SPDX-License-Identifier: Apache-2.0
"""The C++ path against the literal attention in float64, with every layout of its tensors."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget, keep, within_budget
from draws import drawing

from samfast import backends
from samfast.functional import relpos_attention, window_relpos_attention
from samfast.kernels._common.budget import Budget
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import cpu_path

from .calls import NAMES, Call, cast_expanded

pytestmark = pytest.mark.skipif(
    backends.native_missing() is not None, reason=str(backends.native_missing())
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WINDOWED = Windows(2, 20, 17, 14, 14)
WHOLE = Windows.whole(2, 9, 13)


def name_of(value):
    return "x".join(map(str, value)) if isinstance(value, Windows) else str(value).split(".")[-1]


@pytest.mark.slow_on_cpu("rows-bfloat16", "2x20x17x14x14-None")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("pads", ["rows", "bias", None])
@pytest.mark.parametrize(
    "windows", [WINDOWED, Windows(1, 14, 30, 14, 14), Windows(1, 5, 9, 14, 14)], ids=name_of
)
def test_windows_with_pads(windows, pads, dtype):
    Call(windows, pads=pads).check(cpu_path, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128])
def test_every_width_of_a_head(head_dim, dtype):
    Call(WHOLE, head_dim=head_dim).check(cpu_path, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "windows",
    [
        Windows.whole(3, 1, 1),
        Windows.whole(1, 2, 100),
        Windows.whole(1, 70, 2),
        Windows(2, 28, 14, 14, 14),
        Windows(1, 3, 4, 2, 3),
    ],
    ids=name_of,
)
def test_maps_of_other_shapes(windows, dtype):
    Call(windows).check(cpu_path, dtype)


def test_far_keys_keep_their_digits():
    """Each weight by itself, however small it is beside the largest."""
    logit = torch.linspace(-80, 0, 8191)
    q, k, v = (torch.zeros(8191, 1, 1, 2, 16) for _ in range(3))
    q[..., 0] = 4 * logit[:, None, None, None]  # 1 / 4 is the scale
    k[..., 1, 0] = v[..., 1, 0] = 1.0
    weight = relpos_attention(q, k, v, torch.zeros(1, 16), torch.zeros(3, 16), backend="cpu")
    pair = torch.stack([torch.zeros(8191), logit], 1)
    exact = pair.double().softmax(1)[:, 1]

    def relative(dtype):
        return pair.to(dtype).softmax(1)[:, 1] / exact

    stock, one = (partial(relative, t) for t in (torch.float32, torch.float64))
    within_budget(weight[:, 0, 0, 0, 0] / exact, stock, one, torch.float32)


@pytest.mark.slow_on_cpu
def test_a_global_map_of_sam():
    Call(Windows.whole(1, 64, 64), heads=1, head_dim=64).check(cpu_path)


@pytest.mark.parametrize("head_dim", range(16, 129, 16))
def test_every_width_by_small_maps(head_dim):
    Call(Windows.whole(1, 3, 5), heads=1, head_dim=head_dim).check(cpu_path)


def test_steep_softmax():
    """Logits of many hundreds, either sign: one key takes nearly all, the others underflow."""
    call = Call(WHOLE)
    call.tokens["q"] *= 40
    call.tokens["k"] *= 10
    call.check(cpu_path)


@pytest.mark.parametrize("windows", [WINDOWED._replace(batch=0), Windows.whole(0, 3, 3)], ids=str)
def test_batch_of_none(windows):
    *made, dtable_h, dtable_w = Call(windows).run(cpu_path)[0]
    assert all(t.shape[0] == 0 for t in made if t is not None)
    assert not dtable_h.any() and not dtable_w.any()


def gapped(order):
    """A layout: dimensions stored in another order, every stride doubled, NaN in the gaps."""

    def layout(t):
        places = order if t.dim() == 5 else [d - (d > 1) for d in order if d != 1]
        sizes = [t.shape[d] for d in places]
        room = torch.full([2 * size + 1 for size in sizes], torch.nan, dtype=t.dtype)
        view = room[tuple(slice(1, None, 2) for _ in sizes)]
        back = [places.index(d) for d in range(t.dim())]
        view = view.permute(back)
        view.copy_(t)
        layout.rooms.append((room, view))
        return view

    layout.rooms = []
    return layout


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 0, 4, 1, 2]], ids=str)
def test_any_strides_and_nothing_outside_is_written(order, dtype):
    call, layout = Call(WINDOWED), gapped(order)
    plain, lse = call.run(cpu_path, dtype)
    strided, strided_lse = call.run(cpu_path, dtype, layout=layout)
    assert torch.equal(lse, strided_lse)
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))
    assert len(layout.rooms) == 11
    for room, view in layout.rooms:
        view.fill_(torch.nan)
        assert room.isnan().all()


def test_packed_qkv_and_its_gradient():
    call = Call(WINDOWED)
    expected, _ = call.run(cpu_path)
    q, k, v = (t.float() for t in call.tokens.values())
    qkv = torch.stack([q, k, v], 3)
    dqkv = torch.full_like(qkv, torch.nan)
    inputs = [*qkv.unbind(3), *call.arguments(torch.float32)[3:]]
    out, lse = cpu_path.forward(*inputs, call.windows, call.scale)
    cpu_path.backward(
        call.dout.float(), *inputs, out, lse, call.windows, call.scale, *dqkv.unbind(3), None,
        None, False,
    )  # fmt: skip
    assert torch.equal(dqkv, torch.stack(expected[1:4], 3))


def test_incoming_gradient_may_be_expanded():
    call = Call(WHOLE)
    call.dout = call.dout[:1, :1, :1, :1, :1]
    dense = Call(WHOLE)
    dense.dout = call.dout.expand_as(dense.dout).clone()
    call.dout = call.dout.expand_as(dense.dout)
    layout = lambda t: cast_expanded(t, torch.float32) if 0 in t.stride() else t  # noqa: E731
    ours, _ = call.run(cpu_path, layout=layout)
    expected, _ = dense.run(cpu_path)
    pairs = zip(ours, expected, strict=True)
    assert all(b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("want_pads", [False, True])
@pytest.mark.parametrize("need_tables", [False, True])
def test_only_what_is_wanted_and_its_bits_are_the_same(want_pads, need_tables):
    call = Call(WINDOWED)
    everything, _ = call.run(cpu_path)
    made, _ = call.run(cpu_path, want_pads=want_pads, need_tables=need_tables)
    wanted = [True] * 4 + [want_pads] * 2 + [need_tables] * 2
    for mine, full, want in zip(made, everything, wanted, strict=True):
        assert torch.equal(mine, full) if want else mine is None


def test_bits_repeat_and_nothing_given_is_written():
    call = Call(WINDOWED)
    given = call.arguments(torch.float32)
    copies = [t.clone() for t in given]
    call.arguments = lambda dtype: given
    first, second = call.run(cpu_path), call.run(cpu_path)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


def with_threads(call, counts):
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results, lse = call.run(cpu_path)
            outcomes.append([lse, *(t for t in results if t is not None)])
    finally:
        torch.set_num_threads(before)
    return outcomes


def test_bits_do_not_depend_on_the_threads_where_heads_are_enough():
    first, *others = with_threads(Call(WINDOWED), (1, 2, 3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "windows", [Windows.whole(1, 33, 32), Windows(1, 18, 20, 32, 36)], ids=name_of
)
def test_one_head_on_many_threads(windows):
    """Threads share the queries in the forward and, above 1024 keys, the keys in the backward."""
    call = Call(windows, heads=1)
    alone, *others = with_threads(call, (1, 2, 3, 5))
    again = with_threads(call, (2, 3, 5))
    stock, exact = (partial(call.literal, t) for t in (torch.float32, torch.float64))
    budget = Budget(stock, exact, torch.float32)
    for outcome, repeated in zip(others, again, strict=True):
        assert torch.equal(outcome[0], alone[0]) and torch.equal(outcome[1], alone[1])
        assert all(torch.equal(a, b) for a, b in zip(outcome, repeated, strict=True))
        keep(budget, dict(zip(budget.exact, outcome[1:], strict=True)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", ["q", "k", "v", "dout", "table_h", "table_w"])
def test_what_is_not_finite_spreads_as_in_the_literal(place, value):
    call = Call(Windows.whole(1, 9, 12))
    if place.startswith("table"):
        call.tables["hw".index(place[-1])][3, 5] = value
    elif place == "dout":
        call.dout[0, 4, 7, 1, 3] = value
    else:
        call.tokens[place][0, 4, 7, 1, 3] = value
    ours, literal = call.run(cpu_path)[0], call.literal(torch.float32)
    for name, mine in zip(NAMES, ours, strict=True):
        if name in literal:
            assert torch.equal(mine.isfinite(), literal[name].isfinite()), name


def test_keys_of_minus_infinity_weigh_nothing():
    """A first tile of keys with no weight at all must not poison the later ones."""
    call = Call(Windows.whole(1, 9, 20), heads=1)
    call.tokens["q"][..., 0] = 1.0
    call.tokens["k"][:, :6, ..., 0] = -torch.inf
    inputs = call.arguments(torch.float32)
    ours, _ = cpu_path.forward(*inputs, call.windows, call.scale)
    stock, exact = (partial(call.literal, t) for t in (torch.float32, torch.float64))
    assert exact()["out"].isfinite().all()
    all_within_budget({"out": ours}, stock, exact, torch.float32, some=True)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=name_of)
def test_tables_of_any_dtype(dtype):
    call = Call(WHOLE)
    call.tables = [t.to(dtype).double() for t in call.tables]
    expected, _ = call.run(cpu_path)
    arguments = call.arguments(torch.float32)
    call.arguments = lambda _: [*arguments[:5], *(t.to(dtype) for t in call.tables)]
    ours, _ = call.run(cpu_path)
    for mine, theirs in zip(ours, expected, strict=True):
        assert theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_public_function_with_every_source_of_padding(dtype):
    heads, head_dim, rank, window = 2, 16, 3, 14
    windows = Windows(2, 20, 17, window, window)
    columns = 3 * heads * head_dim
    draw = drawing(5, device="cpu")
    qkv, dout = draw(2, 20, 17, columns), draw(2, 20, 17, columns // 3)
    tables = [draw(2 * window - 1, head_dim, divisor=2.5) for _ in range(2)]
    padding = [draw(columns), draw(windows.batch * windows.pads, rank), draw(columns, rank)]

    def results(dtype, backend):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [qkv.to(dtype), *(t.to(wide) for t in (*tables, *padding))]
        x, *small = leaves = [t.requires_grad_() for t in leaves]
        names = dict(zip(("pad_bias", "pad_h", "pad_b"), small[2:], strict=True))
        out = window_relpos_attention(x, heads, window, *small[:2], **names, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    names = ("out", "dqkv", "dtable_h", "dtable_w", "dpad_bias", "dpad_h", "dpad_b")
    stock, exact = (partial(results, t, "reference") for t in (dtype, torch.float64))
    all_within_budget(results(dtype, "cpu"), stock, exact, dtype, names)


def test_refuses_float64():
    q = torch.randn(1, 1, 2, 2, 16, dtype=torch.float64)
    table = torch.randn(3, 16, dtype=torch.float64)
    sentence = "float64, but the C\\+\\+ code takes float32, float16 and bfloat16"
    with pytest.raises(RuntimeError, match=sentence):
        relpos_attention(q, q, q, table, table, backend="cpu")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"k": (1, 3, 3, 2, 16)}, "k has size 3 in dimension 2, not 4"),
        ({"v": (1, 3, 4, 2)}, "v has 4 dimensions, not 5"),
        ({"table_h": (3, 16)}, "table_h has 48 elements, not 80"),
        ({"q": (1, 3, 4, 2, 24)}, "head_dim 24 is not a multiple of 16 up to 128"),
    ],
    ids=str,
)
def test_native_code_checks_what_it_is_given(change, sentence):
    shapes = dict.fromkeys(("q", "k", "v"), (1, 3, 4, 2, 16))
    shapes |= {"table_h": (5, 16), "table_w": (7, 16)} | change
    q, k, v, *tables = (torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(RuntimeError, match=sentence):
        cpu_path.forward(q, k, v, None, None, *tables, Windows.whole(1, 3, 4), 1.0)
