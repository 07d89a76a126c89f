# SPDX-License-Identifier: Apache-2.0
"""The branch's Triton kernels under the guarded interpreter."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from budgets import all_within_budget, assert_same_dtypes

from samfast import backends
from samfast.counters import count

if torch.cuda.is_available() or backends.triton_missing(torch.device("cpu")):
    pytest.skip("beside a GPU test_values runs the compiled kernels", allow_module_level=True)

from guarded import ORDERS, guarded

from samfast.kernels.adapt_former import costs, torch_path
from samfast.kernels.adapt_former import triton_kernels as kernels

from .cases import NAMES, Case

HALF = torch.float16
EVERY = (True,) * 5
CASES = (
    Case(shape=(70, 48), bottleneck=16),
    Case(shape=(70, 48), bottleneck=6, dropout=0.3),
    Case(shape=(9, 33), bottleneck=1),
    Case(shape=(3, 130), bottleneck=17, dropout=0.1),
    Case(shape=(35, 16), bottleneck=32, mean=1e3, spread=0.1),
    Case(shape=(5, 48), mean=5.0, spread=0.0),
)


@pytest.mark.slow_on_cpu("v1", "v6", "v16", "3x130-v17-drop0.1-0.0-torch.float16")
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.id}-{case.mean}")
def test_budget(case, dtype):
    stock, exact = (partial(case.run, t, "literal") for t in (dtype, torch.float64))
    ours = case.run(dtype, "triton")
    assert_same_dtypes(ours, all_within_budget(ours, stock, exact, dtype, NAMES))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(shape=(70, 1280), dropout=0.1), HALF),
        (Case(shape=(70, 768), bottleneck=128), HALF),
        (Case(shape=(35, 768), bottleneck=32, dropout=0.2), torch.float32),
    ],
    ids=str,
)
def test_budget_at_the_widths_of_sam(case, dtype):
    stock, exact = (partial(case.run, t, "literal") for t in (dtype, torch.float64))
    ours = case.run(dtype, "triton")
    all_within_budget(ours, stock, exact, dtype, NAMES)


def test_float32_parameters_beside_narrow_rows():
    case = CASES[1]
    stock, exact = (partial(case.run, t, "literal") for t in (HALF, torch.float64))
    ours = case.run(HALF, "triton", torch.float32)
    assert [t.dtype for t in ours] == [HALF] * 3 + [torch.float32] * 6
    all_within_budget(ours, stock, exact, HALF, NAMES)


def test_autocast():
    """x stays float32 up to its norm; the products and the bottleneck are narrow."""
    case = CASES[1]

    def run(backend):
        leaves, dy = case.tensors(torch.float32)
        with torch.autocast("cpu", HALF):
            y = case.call([leaves[0], leaves[1].half(), *leaves[2:]], backend)
        return [y, *torch.autograd.grad(y, leaves, dy.half())]

    ours, exact = run("triton"), partial(case.run, torch.float64, "literal")
    budget = all_within_budget(ours, partial(run, "literal"), exact, HALF, NAMES)
    assert_same_dtypes(ours, budget)


@pytest.mark.slow_on_cpu
def test_every_order_gives_the_same_bits():
    """And every run."""
    case, results = CASES[1], []
    for order in ORDERS:
        with guarded(order) as guard:
            results.append(case.run(torch.float32, "triton"))
        assert guard.launches == 6  # up_kernel, up_backward_kernel and its reduction are among them
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def few_partials(monkeypatch):
    """None of the pass over whole rows, and two of chunks of rows."""
    for owner in (kernels, costs):
        monkeypatch.setattr(owner, "MAX_ALONG", 0)
    monkeypatch.setattr(kernels, "chunk_rows", lambda tokens, block_m: block_m * 2)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(shape=(150, 48), bottleneck=6, dropout=0.3), HALF),
        pytest.param(Case(shape=(150, 48), bottleneck=16), torch.float32, marks=pytest.mark.slow),
        pytest.param(Case(shape=(150, 130), bottleneck=17), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(
            Case(shape=(35, 16), bottleneck=32, mean=1e3, spread=0.1), HALF, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else str(value),
)
def test_gradients_of_chunks_of_rows(case, dtype, few_partials):
    """Where each program's own partials would be too many; in every order the same bits."""
    results = []
    for order in ORDERS:
        with guarded(order) as guard:
            results.append(case.run(dtype, "triton"))
        assert guard.launches == 7
    stock, exact = (partial(case.run, t, "literal") for t in (dtype, torch.float64))
    assert_same_dtypes(results[0], all_within_budget(results[0], stock, exact, dtype, NAMES))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow_on_cpu
def test_both_ways_make_the_same_dx(monkeypatch):
    """And what is wanted alone is made with the same bits."""
    x, side, dz, _ = arguments(CASES[1], torch.float32)
    made = []
    for most in (2**25, 0):
        monkeypatch.setattr(kernels, "MAX_ALONG", most)
        rest = (dz, dz, x, *side[:3], 1e-5, 0.3)
        every = kernels.low_backward(None, *rest, EVERY)
        for needs in ((False, *EVERY[1:]), (True, False, True, False, False)):
            some = kernels.low_backward(None, *rest, needs)
            assert [d is not None for d in some] == list(needs)
            assert all(d is None or torch.equal(d, e) for d, e in zip(some, every, strict=True))
        made.append(every)
    assert torch.equal(made[0][0], made[1][0])


@pytest.mark.parametrize("bottleneck", [1, 16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [4096, 4 * 4096, 8 * 96 * 96])
def test_scratch(tokens, bottleneck, monkeypatch):
    """Bytes of the backward's partials at ViT-H's width: at most 32 MiB, as the design counts them,
    and three numbers a row."""
    kept, launched = [], []

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def launch(*args, **constants):
                launched.append(self.name)
                kept.extend(t for t in args if isinstance(t, torch.Tensor))

            return launch

    for name in ("low_backward_kernel", "gradient_kernel", "fold_kernel"):
        monkeypatch.setattr(kernels, name, Launch(name), raising=False)

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    x, z = meta(tokens, 1280, dtype=HALF), meta(tokens, bottleneck, dtype=HALF)
    given = [z, meta(tokens, bottleneck, dtype=HALF), x, meta(1280), meta(1280)]
    given.append(meta(bottleneck, 1280))
    made = kernels.low_backward(None, *given, 1e-5, 0.0, EVERY)
    known = {id(t) for t in (*given, *made)}
    scratch = sum(t.nbytes for t in {id(t): t for t in kept}.values() if id(t) not in known)
    design = costs.stages(tokens, 1280, bottleneck, HALF.itemsize)
    start = [stage.name.startswith("norm backward") for stage in design].index(True)
    assert len(launched) == sum(stage.launches for stage in design[start:])
    assert 0 < design[-1].bytes <= scratch <= 2**25 + 12 * tokens
    assert scratch <= design[-1].bytes * (1 + 1 / 1280) + 8 * tokens


def test_launches_and_syncs():
    case = CASES[1]
    leaves, dy = case.tensors(HALF)
    counts = count(lambda: torch.autograd.grad(case.call(leaves, "triton"), leaves, dy))
    design = costs.stages(*case.shape, case.bottleneck, HALF.itemsize)
    assert counts.total_launches == sum(stage.launches for stage in design) == 8
    assert counts.launches == {
        "low_kernel": 1,
        "add": 1,
        "up_kernel": 1,
        "sum": 1,
        "up_backward_kernel": 1,
        "reduce_kernel": 1,
        "low_backward_kernel": 1,
        "fold_kernel": 1,
    }
    assert counts.total_syncs == 0


def arguments(case, dtype=HALF):
    (x, _, weight, bias, down, down_bias, *_), _ = case.tensors(dtype)
    x, *side = (t.detach() for t in (x, weight, bias, down, down_bias))
    generator = torch.Generator().manual_seed(3)
    dz, dx = (
        torch.randn(len(x), n, generator=generator).to(dtype) for n in (len(down), x.shape[1])
    )
    return x, side, dz, dx


def beside_nan(t):
    """As a slice of wider rows with NaN in the gaps, at an odd offset."""
    wide = t.new_full((t.shape[0], t.shape[1] + 5), torch.nan)
    wide[:, 3:-2] = t
    return wide[:, 3:-2]


def turned(t):
    return t.t().contiguous().t()


@pytest.mark.slow_on_cpu("turned")
@pytest.mark.parametrize("layout", [beside_nan, turned])
def test_layouts(layout):
    case = CASES[1]
    x, (weight, bias, down, down_bias), dz, dx = arguments(case)
    results = []
    for change in (lambda t: t.clone(), layout):
        seed, given = case.seed, change(x)
        z = kernels.low(given, weight, bias, change(down), down_bias, 1e-5, 0.3, seed, HALF)
        wide = beside_nan(dx) if layout is beside_nan and change is layout else dx.clone()
        grads = kernels.low_backward(
            wide, change(dz), change(z), given, weight, bias, change(down), 1e-5, 0.3, EVERY
        )
        assert grads[0] is wide
        results.append([z, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("path", [torch_path, kernels], ids=["torch", "triton"])
def test_adding_to_a_gradient_that_is_there(path):
    """And only the wanted gradients, with the bits they have beside the others."""
    x, (weight, bias, down, down_bias), dz, dx = arguments(Case(shape=(40, 48)), torch.float32)
    z = path.low(x, weight, bias, down, down_bias, 1e-5, 0.0, None, torch.float32)
    rest = (dz, z, x, weight, bias, down, 1e-5, 0.0)
    every, added = path.low_backward(None, *rest, EVERY), dx.clone()
    assert path.low_backward(added, *rest, (True, *(False,) * 4))[0] is added
    assert torch.equal(added, dx + every[0])
    for i in range(5):
        needs = [i == j or (i == 2 and j == 0) for j in range(5)]
        some = path.low_backward(None, *rest, needs)
        assert [d is not None for d in some] == needs
        assert all(d is None or torch.equal(d, e) for d, e in zip(some, every, strict=True))
    added = dx.clone()
    path.low_backward(added, *rest, (False, *(True,) * 4))
    assert torch.equal(added, dx)


def test_constant_rows_are_those_of_zeros():
    """To the bit, as statistics are of a row less its first element."""
    x, (weight, bias, down, down_bias), dz, _ = arguments(Case(shape=(18, 39)), torch.float32)
    made = []
    for rows in (torch.zeros_like(x), (1e3 * x[:, :1]).expand(x.shape).contiguous()):
        z = kernels.low(rows, weight, bias, down, down_bias, 1e-5, 0.0, None, torch.float32)
        made.append(
            [z, *kernels.low_backward(None, dz, z, rows, weight, bias, down, 1e-5, 0.0, EVERY)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_a_row_of_nan_is_alone():
    x, (weight, bias, down, down_bias), dz, _ = arguments(CASES[0], torch.float32)
    spoilt = x.clone()
    spoilt[5, 7] = torch.nan
    made = []
    for rows in (x, spoilt):
        z = kernels.low(rows, weight, bias, down, down_bias, 1e-5, 0.0, None, torch.float32)
        only_x = (True, *(False,) * 4)
        made.append(
            (z, kernels.low_backward(None, dz, z, rows, weight, bias, down, 1e-5, 0.0, only_x)[0])
        )
    others = torch.arange(len(x)) != 5
    for clean, ours in zip(*made, strict=True):
        assert ours[5].isnan().all() and torch.equal(ours[others], clean[others])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_what_it_reaches_in_torch(value):
    case, results = CASES[0], []
    for which in ("triton", "literal"):
        leaves, dy = case.tensors(torch.float32)
        leaves[0].detach()[5, 7] = value
        y = case.call(leaves, which)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for name, ours, stock in zip(NAMES, *results, strict=True):
        assert torch.equal(ours.isfinite(), stock.isfinite()), name


def test_no_tokens(guarded_kernels):
    case = Case(shape=(0, 48), dropout=0.2)
    y, *grads = case.run(HALF, "triton")
    assert guarded_kernels.launches == 0
    assert y.shape == (0, 48) and not any(t.any() for t in grads)


FAR = """
import sys
import torch
sys.path.insert(0, "tests")
from guarded import guarded
from samfast.kernels.adapt_former import triton_kernels as kernels
from samfast.kernels.adapt_former.triton_kernels import fold_kernel, low_backward_kernel

half = torch.float16
far = 2**30 + 16  # elements between rows: the third begins beyond 2**31
generator = torch.Generator().manual_seed(1)

def draw(*shape, dtype=half):
    return torch.randn(*shape, generator=generator).to(dtype)

def wide(t, gap=far):
    store = torch.empty((t.shape[0] - 1) * gap + 1024, dtype=t.dtype)  # virtual until touched
    return store.as_strided(t.shape, (gap, 1)).copy_(t)

def same(made, expected):
    assert len(made) == len(expected) and all(map(torch.equal, made, expected))

weight, bias, down_bias = (draw(n, dtype=torch.float32) for n in (48, 48, 2))
down, x, dx, dz = draw(2, 48, dtype=torch.float32), draw(3, 48), draw(3, 48), draw(3, 2)
seed = torch.tensor([5])

def stages(x, dx):
    z = kernels.low(x, weight, bias, down, down_bias, 1e-5, 0.2, seed, half)
    grads = kernels.low_backward(dx, dz, z, x, weight, bias, down, 1e-5, 0.2, (True,) * 5)
    return [z, grads[0].clone(), *grads[1:]]

with guarded(poison=False):
    same(stages(wide(x), wide(dx)), stages(x.clone(), dx.clone()))

# What the launchers make is dense; a launch of few columns out of many partials gets so far.
columns = 2**27 + 16  # the last of 17 partials of one rank begins beyond 2**31
many, z, dh = draw(272, 32), draw(272, 1).abs(), draw(272, 1)
factor, sums = draw(1, 32), torch.zeros(17, 1)

def partials(part, gap):
    # one block of columns, whatever lies between the partials
    low_backward_kernel[(17,)](
        None, dh, z, many, None, None, part, sums, None, 272, gap, 1, 0, 32, 1e-5, 1.0, ADD=False,
        NEED_DX=False, NEED_PARTS=True, PRECISION="ieee", BLOCK_M=16, BLOCK_N=32, BLOCK_R=16,
    )

near = torch.zeros(17, 1, 32)
with guarded(poison=False):
    partials(near, 32)
    part = wide(near[:, 0], columns)
    gradient = [torch.empty(1, columns)[:, :32] for _ in range(2)]
    made = []
    for given, gap, out in ((near, 32, gradient[0]), (part, columns, gradient[1])):
        fold_kernel[(1,)](
            given, sums, weight, bias, factor, None, None, out, None, 17, gap, 1, BLOCK_P=16,
            BLOCK_N=32, BLOCK_R=16,
        )
        made.append(out.clone())
    same(made[:1], made[1:])
    assert made[0].count_nonzero() == 32
print("equal")
"""


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31():
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FAR], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr
