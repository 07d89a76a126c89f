# SPDX-License-Identifier: Apache-2.0
"""C++ and interpreted Triton without tables against the literal attention in float64."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget

from samfast import backends
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import cpu_path, tiling
from samfast.kernels.relpos_attention import torch_path as blocks

from .calls import Call
from .cases import SMALL, Case

WINDOWED = Windows(2, 20, 17, 14, 14)
FORMS = (
    WINDOWED,
    Windows(1, 5, 9, 14, 14),
    Windows(2, 24, 30, 24, 24),
    Windows.whole(2, 9, 13),
    Windows.whole(1, 33, 32),  # more keys than a panel keeps
    Windows.whole(3, 1, 1),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
no_native = pytest.mark.skipif(
    backends.native_missing() is not None, reason=str(backends.native_missing())
)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or backends.triton_missing(torch.device("cpu")) is not None,
    reason="kernels are not interpreted here",
)


def name_of(value):
    return "x".join(map(str, value)) if isinstance(value, Windows) else str(value).split(".")[-1]


def equal(ours, expected):
    pairs = zip(ours, expected, strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow_on_cpu("2x24x30x24x24", "float16")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("windows", FORMS, ids=name_of)
@pytest.mark.parametrize(
    "path", [pytest.param(cpu_path, marks=no_native, id="cpu"), pytest.param(blocks, id="blocks")]
)
def test_forms(path, windows, dtype):
    Call(windows).check(path, dtype)


@no_native
@pytest.mark.slow_on_cpu(but=["48"])
@pytest.mark.parametrize("head_dim", range(16, 129, 16))
def test_every_width_of_a_head_in_cpp(head_dim):
    Call(Windows(1, 3, 5, 2, 5), heads=1, head_dim=head_dim).check(cpu_path)


@no_native
def test_one_head_on_many_threads():
    """Above 1024 keys threads share the keys in the backward; parts of dq are added in order."""
    call = Call(Windows.whole(1, 33, 32), heads=1)
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            made.append(call.run(cpu_path)[0])
    finally:
        torch.set_num_threads(before)
    assert equal(made[2], made[1])
    stock, exact = (partial(call.literal, t) for t in (torch.float32, torch.float64))
    ours = {name: t for name, t in zip(exact(), made[1], strict=False)}
    all_within_budget(ours, stock, exact, torch.float32)


@no_native
def test_only_what_is_wanted_in_cpp():
    call = Call(WINDOWED)
    every, some = call.run(cpu_path)[0], call.run(cpu_path, want_pads=False)[0]
    assert equal(some[:4], every[:4]) and some[4] is some[5] is None


@no_native
def test_minus_infinity_weighs_nothing_in_cpp():
    """Logits start at zero without a bias: a tile must not see what it held before."""
    call = Call(Windows.whole(1, 9, 20), heads=1)
    call.tokens["q"][..., 0] = 1.0
    call.tokens["k"][:, :6, ..., 0] = -torch.inf
    ours = cpu_path.forward(
        *call.arguments(torch.float32)[:5], None, None, call.windows, call.scale
    )
    stock, exact = (partial(call.literal, t) for t in (torch.float32, torch.float64))
    all_within_budget({"out": ours[0]}, stock, exact, torch.float32, some=True)


@pytest.fixture
def kernels():
    from samfast.kernels.relpos_attention import triton_kernels

    return triton_kernels


@pytest.fixture
def tiles(monkeypatch):
    """Tiles of sixteen by sixteen in every kernel."""
    monkeypatch.setattr(tiling, "_sizes", lambda *_: [16, 16, 4, 1])


@interpreted
@pytest.mark.slow_on_cpu(but=["1x3x5x3x2-rows-float32", "1x2x10x2x10-None-bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("pads", ["rows", "bias", None])
@pytest.mark.parametrize(
    "windows",
    [
        Windows(1, 3, 5, 3, 2),
        Windows(1, 3, 19, 2, 18),
        Windows(2, 4, 8, 4, 4),
        Windows.whole(1, 2, 10),
        Windows.whole(1, 1, 1),
        Windows(1, 3, 2, 5, 4),
    ],
    ids=name_of,
)
def test_forms_in_triton(windows, pads, dtype, kernels, tiles, guarded_kernels):
    """Several tiles of keys, full ones and not; maps as one line. One launch, and two or three."""
    before = guarded_kernels.launches
    call = Call(windows, heads=1, pads=pads)
    call.check(kernels, dtype)
    alone = windows.height == windows.width == 1
    backward = 0 if alone else 2 if dtype == torch.bfloat16 else 3
    assert guarded_kernels.launches - before == 1 + backward


@interpreted
@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("target", ["sm_90", "default"])
@pytest.mark.parametrize("head_dim", [48, 80, 112])
def test_heads_in_two_parts_with_the_tiles_of_gpus(head_dim, target, kernels, monkeypatch):
    monkeypatch.setattr(tiling, "target", lambda x: target)
    for windows in (Windows(1, 9, 10, 9, 9), Windows.whole(1, 9, 10)):
        Call(windows, heads=1, head_dim=head_dim).check(kernels, torch.bfloat16)


@interpreted
@pytest.mark.slow_on_cpu
def test_layouts_in_triton(kernels):
    """A map whose keys do not lie as one line, though its queries do."""
    call = Call(Windows.whole(1, 3, 5), heads=1)
    expected, lse = call.run(kernels)

    def gapped(t):
        if t.dim() != 5:
            return t
        wide = t.new_full((t.shape[0], t.shape[1], t.shape[2] + 1, *t.shape[3:]), torch.nan)
        wide[:, :, : t.shape[2]] = t
        return wide[:, :, : t.shape[2]]

    ours, again = call.run(kernels, layout=gapped)
    assert equal([*ours, again], [*expected, lse])
    arguments = call.arguments(torch.float32)
    arguments[1] = gapped(arguments[1])
    call.arguments = lambda dtype: arguments
    assert equal(call.run(kernels)[0], expected)


@interpreted
@pytest.mark.slow_on_cpu(but=["turned"])
@pytest.mark.parametrize("turn", ["", "interleaved", "halves"], ids=["plain", "turned", "halves"])
def test_the_operator_in_triton(turn):
    case = Case(batch=1, heads=1, height=3, width=5, window=(2, 3), rank=2, turn=turn)
    stock, exact = (partial(case.run, t, "reference") for t in (torch.float32, torch.float64))
    ours = case.run(torch.float32, "triton")
    all_within_budget(ours, stock, exact, torch.float32, case.names)


@interpreted
def test_limits(kernels):
    """Without tables none of the limits of factors and tables hold."""
    huge = Windows.whole(1, 1024, 2048)
    q = torch.empty(1, 1, 1, 16, 64, device="meta", dtype=torch.float16)
    assert "factors of the bias" in kernels.missing(q, huge)
    assert kernels.missing(q, huge, tables=False) is None
    assert "programs" in kernels.missing(q, Windows.whole(2**20, 64, 64), tables=False)
    pads = Windows(1, 1, 1, 2**16, 2**16)
    assert "pads of an image" in kernels.missing(q[:, :, :, :1], pads, tables=False)
    wide = q.new_empty(1, 1, 1, 1, 128, dtype=torch.float32)
    assert "above 64" in kernels.missing(wide, SMALL.windows, tables=False)
