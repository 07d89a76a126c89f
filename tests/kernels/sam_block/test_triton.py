# SPDX-License-Identifier: Apache-2.0
"""The Triton stages under the guarded interpreter, alone and in the whole block."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from budgets import all_within_budget

from samfast import backends
from samfast.counters import counting
from samfast.kernels.sam_block import costs, supports, torch_path

from .cases import Case
from .stage_calls import EPS, SCALING, Call

missing = backends.triton_missing(torch.device("cpu"))
if torch.cuda.is_available() or missing is not None:
    reason = missing or "kernels are compiled, not interpreted, beside a GPU"
    pytest.skip(reason, allow_module_level=True)

from guarded import ORDERS, guarded  # noqa: E402

from samfast.kernels.sam_block import triton_kernels as kernels  # noqa: E402

HALF = torch.float16


def equal(ours, expected):
    assert set(ours) == set(expected)
    return all(torch.equal(value, expected[name]) for name, value in ours.items())


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("rank", [0, 3])
def test_every_order_gives_the_same_bits(rank):
    call = Call(tokens=40, columns=48, rank=rank)
    results = []
    for order in ORDERS:
        with guarded(order) as guard:
            results.append(call.run(kernels))
        assert guard.launches == (12 if rank else 5)
    assert equal(results[1], results[0]) and equal(results[2], results[0])


def beside_nan(t):
    """As a slice of wider rows with NaN in the gaps, at an odd offset."""
    wide = t.new_full((t.shape[0], t.shape[1] + 5), torch.nan)
    wide[:, 3:-2] = t
    return wide[:, 3:-2]


def turned(t):
    return t.t().contiguous().t()


def every_other(t):
    wide = t.new_full((*t.shape, 2), torch.nan)
    wide[..., 0] = t
    return wide[..., 0]


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("layout", [beside_nan, turned, every_other])
def test_layouts(layout):
    call = Call(columns=48, dtype=HALF)
    assert equal(call.run(kernels, layout=layout), call.run(kernels))


def test_a_gradient_seen_everywhere():
    """The residual's gradient of a sum has strides of zero."""
    call = Call(columns=48)
    tensors = call.tensors()
    tensors["residual"] = tensors["residual"][:1, :1].expand(call.tokens, call.columns)
    norm = (tensors["weight"], tensors["bias"], EPS)

    def dx(residual):
        dn = tensors["dn"].clone()
        return kernels.norm_backward(dn, tensors["x"], *norm, residual, None, False)[0]

    assert torch.equal(dx(tensors["residual"]), dx(tensors["residual"].contiguous()))


@pytest.mark.slow_on_cpu("dtype1-128")
@pytest.mark.parametrize(
    ("dtype", "rank"), [(HALF, 17), (HALF, 128), (torch.float32, 16), (torch.float32, 32)]
)
def test_wide_ranks(dtype, rank):
    assert rank <= kernels.MAX_RANK[dtype.itemsize]
    Call(columns=48, rank=rank, dtype=dtype).check(kernels, low_rank=True)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_ranks_above_the_widest_do_not_ride_along(dtype):
    """The engine makes h and the gradient of lora_a; dh A is added before the launch."""
    rank = kernels.MAX_RANK[dtype.itemsize] + 1
    Call(columns=48, rank=rank, dtype=dtype).check(kernels, low_rank=False)


@pytest.mark.slow_on_cpu
def test_partials_of_dz_that_are_too_large_are_not_made(monkeypatch, guarded_kernels):
    """The layer's own launch makes them, some rows at a time; the rest stays as it is."""
    call, tensors = Call(columns=48, dtype=HALF), Call(columns=48, dtype=HALF).tensors()
    every = call.run(kernels, tensors)
    monkeypatch.setattr(costs, "MAX_PARTIALS", 4 * call.tokens * call.rank - 1)
    fewer = call.run(kernels, tensors)
    assert set(every) - set(fewer) == {"dz", "db", "dz_left", "db_left"}
    assert equal(fewer, {name: every[name] for name in fewer})
    low, up = (tensors["dh"], tensors["a"], True), (tensors["z"], tensors["b"], SCALING)
    before = guarded_kernels.launches
    assert kernels.gelu_backward(tensors["dg"], tensors["u"], low, False, up)[3] is None
    assert guarded_kernels.launches - before == 2


def test_supports(monkeypatch):
    x = torch.empty(2, 3, 4, 48)
    for dtype in (torch.float32, HALF, torch.bfloat16):
        assert supports("triton", x.to(dtype)) is None
    assert "torch.float64" in supports("triton", x.double())
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET" in supports("triton", x)


BLOCKS = {
    "windows": Case(batch=1, height=2, width=3, window=2, dim=16, heads=1),
    "global": Case(batch=1, height=2, width=3, window=0, dim=32, heads=2),
}
MANY = Case(batch=3, height=3, width=4, window=2, dim=16, heads=1)  # rows, see costs.room
SLOW = [pytest.mark.slow]


@pytest.mark.slow_on_cpu("dtype0", "global")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("windows", HALF),
        ("global", torch.float32),
        pytest.param("windows", torch.float32, marks=SLOW),
        pytest.param("global", HALF, marks=SLOW),
        ("windows", torch.bfloat16),
        pytest.param("global", torch.bfloat16, marks=SLOW),
    ],
)
def test_whole_blocks(kind, dtype):
    """Every tensor's gradient; trained weights take the rows, trained norms all of dn."""
    case = BLOCKS[kind]
    stock, exact = (partial(case.run, t, "reference") for t in (dtype, torch.float64))
    ours = case.run(dtype, "triton")
    assert set(ours) == set(all_within_budget(ours, stock, exact, dtype).exact)


class Wider(Case):
    """Ranks whose update GELU does not take."""

    rank = 6


WIDER = {
    "windows": Wider(batch=3, height=3, width=4, window=2, dim=16, heads=1),
    "global": Wider(batch=6, height=3, width=4, window=0, dim=32, heads=2),
}


@pytest.mark.slow_on_cpu(but=["windows-lora", "windows-dropout"])
@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, 2),
        ({"experts": True}, 2),
        ({"dropout": 0.4}, 2),
        ({"bias": False}, 2),
        ({"adapters": ("qkv", "lin2")}, 1),
    ],
    ids=["lora", "experts", "dropout", "nobias", "qkv"],
)
@pytest.mark.parametrize("kind", WIDER)
def test_updates_made_by_the_product(kind, changes, layers, monkeypatch):
    """Of qkv and of lin1; each copies its weight once."""
    made, original = [], kernels.joint_weight

    def joint_weight(*arguments):
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(kernels, "joint_weight", joint_weight)
    case = dataclasses.replace(WIDER[kind], **changes)
    stock, exact = (partial(case.run, t, "reference") for t in (HALF, torch.float64))
    ours = case.run(HALF, "triton")
    all_within_budget(ours, stock, exact, HALF)
    assert [weight.shape[1] for weight in made] == layers * [case.dim + costs.ALIGNED]


def test_an_adapter_on_some_columns_adds_its_update():
    case = dataclasses.replace(MANY, sliced=True, batch=4)
    stock, exact = (partial(case.run, t, "reference") for t in (HALF, torch.float64))
    with counting() as counts:
        ours = case.run(HALF, "triton")
    all_within_budget(ours, stock, exact, HALF)
    assert "joint_weight_kernel" not in counts.launches


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("layout", [beside_nan, turned])
def test_a_weight_with_a_factor_behind_it(dtype, layout, guarded_kernels):
    """Of frozen weights in another dtype too; rows of W and of what is made are cut by no tile."""
    draw = torch.randn
    weight, lora_b = layout(draw(21, 272, dtype=dtype)), layout(draw(21, 3))
    made = kernels.joint_weight(weight, lora_b, SCALING, 16, HALF)
    assert torch.equal(made, torch_path.joint_weight(weight, lora_b, SCALING, 16, HALF))
    assert guarded_kernels.launches == 1


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_room_behind_a_norm_s_rows(rank):
    """The rows are those without room; behind them are h and zeros."""
    call = Call(columns=48, rank=rank, dtype=HALF)
    t = call.tensors()
    norm = (t["weight"], t["bias"], EPS, HALF, t.get("a"))
    for made, wide in (
        (kernels.norm(t["x"], *norm), kernels.norm(t["x"], *norm, room=16)),
        (
            kernels.add_norm(t["x"], t["update"], *norm)[1:],
            kernels.add_norm(t["x"], t["update"], *norm, room=16)[1:],
        ),
    ):
        (n, h), (rows, h_wide) = made, wide
        assert torch.equal(rows[:, :48], n) and rows.shape == (call.tokens, 64)
        assert h is h_wide is None or torch.equal(h_wide, h)
        assert torch.equal(rows[:, 48 : 48 + rank], rows[:, :0] if h is None else h)
        assert not rows[:, 48 + rank :].any()


def test_room_is_for_many_rows_in_16_bits():
    lora_a, lora_b = torch.empty(3, 48), torch.empty(144, 3)
    assert kernels.room(lora_a, lora_b, 96, HALF) == 16
    assert kernels.room(lora_a, lora_b, 95, HALF) == 0
    assert kernels.room(lora_a, lora_b, 96, torch.float32) == 0
    assert kernels.room(torch.empty(9, 48), lora_b, 96, HALF) == 0
    assert kernels.room(lora_a, torch.empty(144, 20), 96, HALF) == 0  # behind a map of 3 to 20


class Adapted:
    """A block of which only adapters are trained, its input wanting a gradient too."""

    def __init__(self, case, dtype):
        self.case = case
        self.x, self.tensors, self.dy = case.tensors(dtype)
        self.names = [name if "lora" in name else "" for name in case.names]
        for t, name in zip(self.tensors, self.names, strict=True):
            if t is not None and not name:
                t.requires_grad_(False)

    def run(self, backend, dtype=None):
        """y, dx and the gradients by name."""
        x, tensors, dy = self.x, self.tensors, self.dy
        if dtype is not None:
            x, *tensors, dy = (
                t if t is None or not t.is_floating_point() else t.detach().to(dtype)
                for t in (x, *tensors, dy)
            )
            for t, name in zip((x, *tensors), ("x", *self.names), strict=True):
                if name:
                    t.requires_grad_()
        y, _ = self.case.call(x, tensors, backend)
        named = {n: t for n, t in zip(self.names, tensors, strict=True) if n}
        grads = torch.autograd.grad(y, [x, *named.values()], dy)
        return {"y": y.detach(), **dict(zip(("x", *named), grads, strict=True))}


@pytest.mark.slow_on_cpu("3")
@pytest.mark.parametrize(
    ("kind", "rank"),
    [("windows", 3), ("global", 0), pytest.param("global", 3, marks=SLOW), ("many rows", 3)],
)
def test_adapted_blocks(kind, rank):
    """Values, and the launches of the design: 30 with adapters on all layers, 18 without; no cast,
    no copy, no sync."""
    case = (
        (BLOCKS | {"many rows": MANY})[kind]
        if rank
        else dataclasses.replace(BLOCKS[kind], adapters=())
    )
    block = Adapted(case, HALF)
    with counting() as counts:
        ours = block.run("triton")
    stock = partial(block.run, "reference")
    all_within_budget(ours, stock, partial(stock, torch.float64), HALF)

    design = costs.stages(case.windows, case.dim, case.heads, rank, HALF.itemsize)
    assert counts.total_launches == sum(stage.launches for stage in design)
    assert counts.total_launches == (30 if rank else 18)
    assert counts.total_syncs == 0
    assert counts.launches.get("joint_weight_kernel", 0) == (kind == "many rows")
    stages = {name: n for name, n in counts.launches.items() if name.startswith(("norm", "gelu"))}
    assert stages == {
        "norm_row_kernel": 2,
        "gelu_kernel": 1,
        "gelu_backward_kernel": 1,
        "norm_row_backward_kernel": 2,
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", [BLOCKS["windows"], WIDER["windows"]], ids=["few", "many rows"])
def test_memory_modes_give_the_same_bits(case):
    made = {}
    for memory in ("fast", "balanced", "minimal"):
        case = dataclasses.replace(case, memory=memory)
        made[memory] = Adapted(case, HALF).run("triton")
    assert equal(made["balanced"], made["fast"]) and equal(made["minimal"], made["fast"])


def test_gelu_s_tail_keeps_its_digits():
    """Where erff has none left; and Φ beside 0 and 1."""
    u = torch.linspace(-12, 6, 16 * 512).view(-1, 16)
    g, _ = kernels.gelu(u)
    wide = u.double()
    below = 0.5 * torch.special.erfc(-wide / 2**0.5)
    exact = wide * below
    assert ((g - exact).abs() <= 2e-5 * exact.abs() + 1e-35).all()
    slope, *_ = kernels.gelu_backward(torch.ones_like(u), u, None, False)
    density = (-wide * wide / 2).exp() / (2 * torch.pi) ** 0.5
    assert ((slope - below - wide * density).abs() <= 5e-7).all()


FAR = """
import sys
import torch
sys.path.insert(0, "tests")
from guarded import guarded
from samfast.kernels.sam_block import triton_kernels as kernels
from samfast.kernels.sam_block.triton_gelu import gelu_backward_kernel

half = torch.float16
far = 2**30 + 16  # elements between rows: the third begins beyond 2**31
stores = [torch.empty(2 * far + 1024, dtype=half) for _ in range(6)]  # virtual until touched
generator = torch.Generator().manual_seed(1)

def draw(*shape, dtype=half):
    return torch.randn(*shape, generator=generator).to(dtype)

def wide(t, store):
    return store.as_strided(t.shape, (far, 1)).copy_(t)

def same(made, expected):
    assert len(made) == len(expected)
    pairs = zip(made, expected, strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)

weight, bias = draw(48, dtype=torch.float32), draw(48, dtype=torch.float32)
norm, a = (weight, bias, 1e-6), draw(2, 48, dtype=torch.float32)
rows, dh, z = [draw(3, 48) for _ in range(4)], draw(3, 2), draw(3, 2)

def stages(x, update, residual, d, dh, z):
    low, up = (dh, a, True), (z, a.T, 0.5)
    near = kernels.norm_backward(d, x, *norm, residual, low, True)
    near = [near[0], near[1].clone()]
    d.copy_(rows[3])
    made = kernels.gelu_backward(d, x, low, True, up)
    return [
        *kernels.norm(x, *norm, half, a), *kernels.add_norm(x, update, *norm, half, a),
        *kernels.gelu(x, a), *near, *made[:3], *made[3],
    ]

# Rows that lie far apart in what is given, and in what results overwrite.
with guarded(poison=False):
    distant = [wide(t, store) for t, store in zip([*rows, dh, z], stores, strict=False)]
    made = stages(*distant)
    same(made, stages(*(t.clone() for t in rows), dh, z))

# What the launchers make is dense; there a launch of one block out of many gets so far.
columns = 2**27 + 16  # the last of 17 rows, or of 17 partials, begins beyond 2**31
tiles = dict(PRECISION="ieee", BLOCK_M=32, BLOCK_N=32, BLOCK_R=16, LEFT=0)
NONE = [None] * 4
u, d, h, factor = draw(17, 32), draw(17, 32), draw(272, 1), draw(1, 32)
many = draw(272, 32)

def again(g, columns):
    gelu_backward_kernel[(1, 1)](
        d.clone(), u, None, None, g, None, *NONE, 17, columns, 0, 0, 32, 32, 32, 0, 0, 1.0,
        LOW=False, WANT=True, NEED_DA=False, UP=False, NEED_DB=False, **tiles,
    )
    return g.clone()

def db_partials(part, columns):
    gelu_backward_kernel[(17, 1)](
        many.clone(), many, None, None, None, None, h, factor.T.contiguous(),
        torch.empty(1, 272, 1), part, 272, columns, 0, 1, 16, 32, 32, 0, 1, 0.5, LOW=False,
        WANT=False, NEED_DA=False, UP=True, NEED_DB=True, **tiles | dict(BLOCK_M=16),
    )
    return part.clone()

def dz_partials(part, tokens):
    # of two blocks of columns, the first 16 rows; the second begins tokens elements further on
    gelu_backward_kernel[(1, 2)](
        many.view(-1, 64).clone(), many.view(-1, 64), None, None, None, None, None,
        torch.cat([factor, factor], 1).T.contiguous(), part, None, tokens, 64, 0, 1, 16, 64, 64, 0,
        0, 0.5, LOW=False, WANT=False, NEED_DA=False, UP=True, NEED_DB=False,
        **tiles | dict(BLOCK_M=16),
    )
    return part.clone()

def partials(part, columns, ranks=0):
    gelu_backward_kernel[(17, 1)](
        many.clone(), many, h, factor, None, part, *NONE, 272, columns, 1, 0, 16, 32, 32, 1, 0,
        1.0, LOW=True, WANT=False, NEED_DA=True, UP=False, NEED_DB=False, RANKS=ranks,
        **tiles | dict(BLOCK_M=16),
    )
    return part.clone()

with guarded(poison=False):
    near = again(torch.zeros(17, 32, dtype=half), 32)
    same([again(stores[0].as_strided((17, 32), (columns, 1)).zero_(), columns)], [near])
    for ranks in (0, 1):
        near = partials(torch.zeros(17, 32), 32, ranks)
        store = torch.empty(2 * far + 1024).as_strided((17, 32), (columns, 1)).zero_()
        same([partials(store, columns, ranks)], [near])
        assert near.count_nonzero() == near.numel()
    near = db_partials(torch.zeros(17, 32), 32)
    store = torch.empty(2 * far + 1024).as_strided((17, 32), (columns, 1)).zero_()
    same([db_partials(store, columns)], [near])
    assert near.count_nonzero() == near.numel()
    near = dz_partials(torch.zeros(2, 16), 16)
    store = torch.empty(2 * far + 1024).as_strided((2, 16), (2 * far, 1)).zero_()
    same([dz_partials(store, 2 * far)], [near])
    assert near.count_nonzero() == near.numel()
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
