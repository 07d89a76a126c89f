# SPDX-License-Identifier: Apache-2.0
"""The Triton path under the guarded interpreter against the literal attention in float64."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from budgets import within_budget

from samfast import backends
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import tiling

from .calls import Call

missing = backends.triton_missing(torch.device("cpu"))
if torch.cuda.is_available() or missing is not None:
    reason = missing or "kernels are compiled, not interpreted, beside a GPU"
    pytest.skip(reason, allow_module_level=True)

from guarded import ORDERS, guarded  # noqa: E402

from samfast.kernels.relpos_attention import triton_kernels as kernels  # noqa: E402

SLOW = [pytest.mark.slow]
PADDED = Windows(1, 20, 17, 14, 14)
SMALL = Windows(1, 3, 5, 3, 2)
NAMES_IN = ("q", "k", "v", "dout")
TWO_TILES = Windows.whole(1, 2, 20)  # of keys in each line, with tiles of sixteen


def equal(ours, expected):
    pairs = zip(ours, expected, strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def tiles(monkeypatch):
    """Tiles of sixteen by sixteen in every kernel."""
    monkeypatch.setattr(tiling, "_sizes", lambda *_: [16, 16, 4, 1])


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    ("pads", "dtype"),
    [
        ("bias", torch.float32),
        pytest.param("rows", torch.float16, marks=SLOW),
        pytest.param("bias", torch.bfloat16, marks=SLOW),
        pytest.param(None, torch.float32, marks=SLOW),
    ],
)
def test_padded_windows(pads, dtype):
    Call(PADDED, heads=1, pads=pads).check(kernels, dtype)


@pytest.mark.slow_on_cpu
def test_windows_with_the_tiles_of_sm_90(monkeypatch):
    """128 keys to a program, beside 32 queries at a time: more keys than queries."""
    monkeypatch.setattr(tiling, "target", lambda x: "sm_90")
    call = Call(Windows(1, 14, 5, 14, 14), heads=1, pads="bias")
    sizes = tiling.blocks("dkv", call.tokens["q"].bfloat16(), call.windows)
    assert (sizes["BLOCK_M"], sizes["BLOCK_N"]) == (32, 128)
    call.check(kernels, torch.bfloat16)


@pytest.mark.slow_on_cpu(but=["one-hot-None"])
@pytest.mark.parametrize("pads", ["bias", "rows", None])
@pytest.mark.parametrize("windows", [SMALL, Windows(1, 3, 19, 2, 18)], ids=["one-hot", "lines"])
def test_kinds_of_padding(windows, pads):
    Call(windows, heads=1, pads=pads).check(kernels)


@pytest.mark.slow_on_cpu("1x9x13x9x13", "1x2x3x4x20")
@pytest.mark.parametrize(
    "windows",
    [
        Windows.whole(1, 9, 13),
        Windows.whole(1, 1, 1),
        Windows.whole(1, 1, 17),
        Windows.whole(1, 17, 1),
        pytest.param(Windows.whole(2, 3, 70), marks=SLOW),
        Windows(1, 3, 2, 5, 4),  # larger than the map
        Windows(1, 2, 3, 4, 20),
    ],
    ids=lambda windows: "x".join(map(str, windows)),
)
def test_sizes(windows):
    Call(windows, heads=1).check(kernels)


@pytest.mark.slow_on_cpu(but=["80-dtype3-lines"])
@pytest.mark.parametrize(
    "windows", [Windows(1, 2, 3, 2, 2), Windows.whole(1, 2, 18)], ids=["one-hot", "lines"]
)
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        pytest.param(48, torch.float32, marks=SLOW),  # wider ones are refused in float32
        pytest.param(48, torch.float16, marks=SLOW),
        pytest.param(80, torch.float16, marks=SLOW),
        (80, torch.bfloat16),
        pytest.param(112, torch.float16, marks=SLOW),
    ],
)
def test_heads_in_two_parts(windows, head_dim, dtype):
    Call(windows, heads=2, head_dim=head_dim).check(kernels, dtype)


@pytest.mark.slow_on_cpu(but=["torch.bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tiles_to_a_line(tiles, dtype):
    Call(TWO_TILES, heads=1).check(kernels, dtype)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    ("width", "head_dim"), [(18, 16), pytest.param(40, 96, marks=SLOW)], ids=str
)
def test_sums_of_several_tiles_are_rounded_once(tiles, width, head_dim, monkeypatch):
    """Sums of dS over the lines of keys in bfloat16: float32 until they are operands."""
    call, made = Call(Windows.whole(1, 2, width), heads=1, head_dim=head_dim), {}
    original = kernels.dq_kernel

    class Launch:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                names = original.arg_names
                made.update(zip(names, args, strict=False))
                return original[grid](*args, **constants)

            return launch

    monkeypatch.setattr(kernels, "dq_kernel", Launch())
    call.run(kernels, torch.bfloat16)
    drel = made["drel_h_ptr"][0, 0].T  # (queries, lines)

    def sums(dtype):
        """From what the kernel was given: its factors, of which rel_h is less lse, and delta."""
        q, k, v, dout = (made[f"{n}_ptr"].reshape(-1, head_dim).to(dtype) for n in NAMES_IN)
        rel_h = made["rel_h_ptr"][0, 0].T.to(dtype) * math.log(2)
        rel_w = made["rel_w_ptr"][0, 0, :, :width].to(dtype)
        logits = (q @ k.T * call.scale).unflatten(1, (2, width))
        logits = logits + rel_h[:, :, None] + rel_w[:, None]
        delta = made["delta_ptr"][0, 0, :, None, None].to(dtype)
        weights = logits.exp()
        return (weights * ((dout @ v.T).unflatten(1, (2, width)) - delta)).sum(2)

    within_budget(drel, partial(sums, torch.float32), partial(sums, torch.float64), torch.float32)


@pytest.mark.slow_on_cpu("torch.float32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "lines"), [(4, 2), (3, 1)])
def test_lines_of_keys_in_a_turn(height, lines, dtype, monkeypatch):
    """Of a height that they do not divide the forward takes one at a time."""
    asked, original = [], kernels.forward_kernel

    class Launch:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                asked.append(constants.get("LINES"))
                return original[grid](*args, **constants)

            return launch

    monkeypatch.setattr(kernels, "forward_kernel", Launch())
    Call(Windows.whole(1, height, 17), heads=1).check(kernels, dtype)
    exact = [1] if dtype == torch.float32 else []  # of the weights, in the backward
    assert asked == [lines, *exact]


@pytest.mark.slow_on_cpu
def test_tiles_that_are_full(tiles):
    """No masks where every tile of queries and of keys is full."""
    Call(Windows.whole(1, 2, 32), heads=1).check(kernels)
    Call(Windows(1, 4, 8, 4, 4), heads=1).check(kernels)
    Call(Windows(1, 5, 4, 4, 4), heads=1).check(
        kernels, torch.float32
    )  # but not in the last window


def packed(t):
    """As a slice of packed rows with NaN beside it."""
    wide = t.new_full((*t.shape[:3], 3, *t.shape[3:]), float("nan"))
    wide[:, :, :, 1] = t
    return wide[:, :, :, 1]


def turned(t):
    """Lines and columns of the map swapped in memory, heads first."""
    return t.permute(3, 0, 2, 1, 4).contiguous().permute(1, 3, 2, 0, 4)


def spread(t):
    """Every other element of a head, which the launcher makes dense."""
    wide = t.new_full((*t.shape, 2), float("nan"))
    wide[..., 0] = t
    return wide[..., 0]


def of_tokens(layout):
    return lambda t: layout(t) if t.dim() == 5 else t


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("layout", [packed, turned, spread])
@pytest.mark.parametrize(
    "windows",
    [Windows(1, 3, 3, 3, 2), pytest.param(TWO_TILES, marks=SLOW)],
    ids=["one-hot", "lines"],
)
def test_layouts(windows, layout):
    call = Call(windows)
    (expected, lse), (ours, again) = call.run(kernels), call.run(kernels, layout=of_tokens(layout))
    assert equal([*ours, again], [*expected, lse])


def test_a_map_in_packed_rows():
    """As a block has it: q, k and v lie apart, dout lies densely."""
    call = Call(Windows.whole(1, 5, 17), heads=1)  # two tiles of queries
    inputs = iter(range(3))

    def layout(t):
        return packed(t) if t.dim() == 5 and next(inputs, None) is not None else t

    (expected, lse), (ours, again) = (
        call.run(kernels, torch.bfloat16, layout=each) for each in (None, layout)
    )
    assert equal([*ours, again], [*expected, lse])


@pytest.mark.slow_on_cpu
def test_dout_seen_everywhere():
    """The gradient of a sum has strides of zero."""
    call = Call(Windows.whole(1, 2, 3))
    row = call.dout[:1, :1, :1, :, :1]
    call.dout = row.expand(call.dout.shape)
    seen, _ = call.run(kernels, layout=lambda t: t)
    call.dout = call.dout.contiguous()
    dense, _ = call.run(kernels)
    assert equal(seen, dense)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(("want_pads", "need_tables"), [(True, False), (False, True)])
def test_only_what_is_wanted(want_pads, need_tables, guarded_kernels):
    windows = SMALL
    call = Call(windows, heads=1)
    every, _ = call.run(kernels)
    before = guarded_kernels.launches
    some, _ = call.run(kernels, want_pads=want_pads, need_tables=need_tables)
    assert guarded_kernels.launches - before == (8 if need_tables else 6)
    there = [want_pads and windows.pads > 0] * 2 + [need_tables] * 2
    assert [t is not None for t in some[4:]] == there
    assert all(torch.equal(a, b) for a, b in zip(some, every, strict=True) if a is not None)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("windows", [SMALL, TWO_TILES], ids=["one-hot", "lines"])
def test_every_order_gives_the_same_bits(windows):
    results = []
    for order in ORDERS:
        with guarded(order) as guard:
            made, lse = Call(windows).run(kernels, torch.float16)
        assert guard.launches == 7
        results.append([*made, lse])
    assert equal(results[1], results[0]) and equal(results[2], results[0])


def test_no_images(guarded_kernels):
    for windows in (Windows.whole(0, 9, 13), Windows(0, 20, 17, 14, 14)):
        made, lse = Call(windows).run(kernels, torch.float16)
        assert made[0].shape == made[1].shape == (0, *windows[1:3], 2, 16)
        assert lse.shape == (0, 2, windows[1] * windows[2])
        assert not made[6].any() and made[6].shape == (2 * windows.height - 1, 16)
        assert made[7].dtype == torch.float32
    assert guarded_kernels.launches == 0


def sentence(windows, head_dim=64, dtype=torch.float16, heads=16):
    q = torch.empty(windows.batch, 1, 1, heads, head_dim, device="meta", dtype=dtype)
    return kernels.missing(q, windows)


def test_limits():
    assert sentence(Windows(64, 64, 64, 14, 14)) is None
    assert sentence(Windows.whole(64, 256, 256)) is None
    assert sentence(Windows.whole(1, 64, 64), 64, torch.float32) is None
    assert "float32 with head_dim 128, above 64" in sentence(
        Windows.whole(1, 64, 64), 128, torch.float32
    )
    assert "2097152 tokens" in sentence(Windows.whole(1, 1024, 2048))
    assert "programs" in sentence(Windows.whole(2**20, 64, 64))
    assert "a table of 67108863 rows of 64" in sentence(Windows(1, 1, 1, 1, 2**25), heads=1)
    assert "4294967295 pads" in sentence(Windows(1, 1, 1, 2**16, 2**16), heads=1)


@pytest.mark.parametrize(
    ("height", "width"), [(33, 16), (31, 2), (16, 16), (14, 14), (20, 17), (100, 3), (3, 100)]
)
def test_the_factors_that_int32_counts_are_those_that_are_made(height, width, monkeypatch):
    """Of a head: its factors as the launcher allocates them, with one more window and without."""
    made = []

    class Launch:
        def __getitem__(self, grid):
            return lambda q, table_h, table_w, *rest, **constants: made.extend(rest[:2])

    monkeypatch.setattr(kernels, "prepare_kernel", Launch())
    tables = [torch.empty(2 * size - 1, 16, device="meta") for size in (height, width)]

    def most(windows):
        """Elements of the larger one."""
        made.clear()
        shape = (1, windows.image_height, windows.image_width, 1, 16)
        q = torch.empty(shape, device="meta", dtype=torch.float16)
        if tiling.one_hot(windows):
            made.append(kernels._small_factors(q, windows)[0])
        else:
            kernels._prepare(q, *tables, windows)
        return max(t.numel() for t in made if t is not None)

    one = most(Windows(1, height, width, height, width))
    fit = (2**31 - 1) // one
    for count in (fit, fit + 1):
        windows = Windows(1, height * count, width, height, width)
        assert (most(windows) < 2**31) == (sentence(windows, 16, heads=1) is None) == (count == fit)


@pytest.mark.slow_on_cpu
def test_negative_and_no_scale():
    """The bias does not hang on the scale."""
    for scale, windows in ((-0.3, TWO_TILES), (0.0, Windows.whole(1, 2, 3))):
        call = Call(windows, heads=1)
        call.scale = scale
        call.check(kernels)


@pytest.mark.parametrize(
    "windows",
    [Windows.whole(1, 5, 7), pytest.param(TWO_TILES, marks=pytest.mark.slow_on_cpu)],
    ids=["one-hot", "lines"],
)
def test_a_large_bias(windows):
    """Forward and backward round the same factors, or the weights of a query no longer add up."""
    call = Call(windows, heads=1)
    call.tables = [20.0 * t for t in call.tables]
    call.check(kernels, torch.bfloat16)


@pytest.mark.parametrize("most", [40_000.0, 60_000.0])
def test_a_bias_near_the_end_of_float16(most):
    """Its product with a logarithm's base would be infinite."""
    call = Call(Windows(1, 4, 4, 4, 4), heads=1)
    call.tokens["q"] = torch.zeros_like(call.tokens["q"])
    call.tokens["q"][..., 0] = 200.0
    for table in call.tables:
        table.zero_()
    call.tables[0][:, 0] = most / 200.0
    (out, *_), lse = call.run(kernels, torch.float16)
    assert out.isfinite().all() and lse.isfinite().all()


def test_a_row_of_a_table_that_nobody_meets():
    """The window is larger than the image."""
    call = Call(Windows(1, 3, 5, 6, 3), heads=1)
    clean, _ = call.run(kernels)
    call.tables[0][-1] = torch.nan
    made, _ = call.run(kernels)
    assert all(torch.equal(a, b) for a, b in zip(made[:6], clean[:6], strict=True) if a is not None)


FAR = """
import sys
import torch
sys.path.insert(0, "tests")
from guarded import guarded
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import triton_kernels as kernels

far = 2**30 + 16  # elements between lines: the third begins beyond 2**31
stores = [torch.empty(2 * far + 4096, dtype=torch.float16) for _ in range(7)]  # virtual at first
generator = torch.Generator().manual_seed(1)

def draw(*shape, dtype=torch.float16):
    return torch.randn(*shape, generator=generator).to(dtype)

def wide(t, store, axis):
    strides = list(t.stride())
    strides[axis] = far
    return store.as_strided(t.shape, strides).copy_(t)

def run(q, k, v, dout, dq, dk, dv, tables, windows):
    out, lse = kernels.forward(q, k, v, None, None, *tables, windows, 0.25)
    grads = kernels.backward(
        dout, q, k, v, None, None, *tables, out, lse, windows, 0.25, dq, dk, dv, None, None, True
    )
    return [out, lse, dq, dk, dv, *grads]

for windows in (Windows.whole(1, 3, 2), Windows.whole(1, 3, 18), Windows.whole(3, 1, 2)):
    shape = (windows.batch, windows.image_height, windows.image_width, 1, 16)
    near = [draw(*shape) for _ in range(7)]
    axis = 0 if windows.batch == 3 else 1
    tables = [draw(2 * n - 1, 16, dtype=torch.float32) for n in windows[3:]]
    with guarded(poison=False):
        distant = [wide(t, store, axis) for t, store in zip(near, stores, strict=True)]
        made, expected = run(*distant, tables, windows), run(*near, tables, windows)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))

# Rows of the padding, and heads, that far apart.
windows = Windows(1, 2, 1, 2, 2)
q, k, v, dout, dq, dk, dv = [draw(1, 2, 1, 3, 16) for _ in range(7)]
pads = [draw(1, 2, 3, 16) for _ in range(4)]
tables = [draw(3, 16, dtype=torch.float32) for _ in range(2)]

def with_pads(pad_k, pad_v, dpad_k, dpad_v, *rest):
    q, k, v, dout, dq, dk, dv = rest
    out, lse = kernels.forward(q, k, v, pad_k, pad_v, *tables, windows, 0.25)
    kernels.backward(dout, q, k, v, pad_k, pad_v, *tables, out, lse, windows, 0.25, dq, dk, dv,
                     dpad_k, dpad_v, False)
    return [out, lse, dq, dk, dv, dpad_k, dpad_v]

with guarded(poison=False):
    expected = with_pads(*[t.clone() for t in pads], q, k, v, dout, dq, dk, dv)
    expected = [t.clone() for t in expected]
    distant = [wide(t, store, 2) for t, store in zip(pads, stores, strict=False)]
    made = with_pads(*distant, q, k, v, dout, dq, dk, dv)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    beyond = 2**31 + 16
    store = torch.empty(4 * beyond, dtype=torch.float16)
    distant = [store[i * 64 :].as_strided((1, 2, 3, 16), (0, beyond, 16, 1)) for i in range(4)]
    for t, source in zip(distant, pads, strict=True):
        t.copy_(source)
    made = with_pads(*distant, q, k, v, dout, dq, dk, dv)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
print("equal")
"""


@pytest.mark.slow_on_cpu
def test_offsets_beyond_two_to_the_31():
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FAR], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr
