# SPDX-License-Identifier: Apache-2.0
"""Every path's element-wise stages against stock modules: values, special rows, what is written."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budgets import all_within_budget, keep, within_budget
from draws import DEVICE

from samfast import backends
from samfast.kernels.sam_block import costs, torch_path

from .stage_calls import EPS, GRADIENTS, SCALING, Call

HALF, BRAIN = torch.float16, torch.bfloat16
CASES = [
    Call(),
    Call(tokens=70, columns=48),  # several chunks of rows under lora_a's gradient
    Call(tokens=16, columns=768, rank=8),
    Call(tokens=17, columns=48, rank=5, dtype=HALF),
    Call(columns=33, rank=1, dtype=HALF, residual=HALF),
    Call(tokens=7, columns=300, dtype=HALF, residual=HALF, affine=HALF),
    Call(dtype=BRAIN, rank=0),
    Call(columns=48, dtype=BRAIN, residual=BRAIN, affine=BRAIN, rank=0),
    Call(tokens=1, columns=1),
    Call(tokens=1, columns=17, mean=-3.0, spread=20.0),
    pytest.param(Call(tokens=70, columns=1280, rank=16), marks=pytest.mark.slow),
    pytest.param(
        Call(tokens=35, columns=1280, dtype=HALF, residual=HALF), marks=pytest.mark.slow
    ),
]  # fmt: skip


def kernels():
    if (reason := backends.triton_missing(DEVICE)) is not None:
        pytest.skip(reason)
    from samfast.kernels.sam_block import triton_kernels

    return triton_kernels


@pytest.fixture(params=["torch", "triton"])
def path(request):
    return torch_path if request.param == "torch" else kernels()


@pytest.mark.slow_on_cpu(
    "triton-21x33", "triton-21x48", "triton-21x100", "triton-16x768-r8", "triton-70x48"
)
@pytest.mark.parametrize("call", CASES, ids=lambda call: call.id)
def test_budget(path, call):
    call.check(path, low_rank=path is not torch_path)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("residual", [torch.float32, BRAIN])
def test_bfloat16_products(residual):
    Call(70, 1280, rank=4, dtype=BRAIN, residual=residual).check(kernels(), low_rank=True)


def test_float64():
    kind = dict.fromkeys(("dtype", "residual", "affine"), torch.float64)
    call = Call(**kind)
    tensors = call.tensors()
    keep(call.budget(tensors), call.run(torch_path, tensors), some=True)


@pytest.mark.slow_on_cpu
def test_h_is_what_the_engine_makes_of_the_rows():
    """From the rows as they are stored, rounded, and in their dtype."""
    call = Call(tokens=7, columns=300, rank=16, dtype=HALF, residual=HALF)
    tensors = call.tensors()
    made = call.run(kernels(), tensors)
    a = tensors["a"]
    for rows, h in (("n", "h"), ("n2", "h2"), ("g", "hg")):
        exact = partial(torch.matmul, made[rows].double(), a.to(HALF).double().T)
        within_budget(made[h], exact().to(HALF), exact, HALF, h)
        assert made[h].is_contiguous() and made[h].dtype == HALF


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("rank", [3, 9])
def test_dz_and_db_are_what_the_engine_makes_of_du(rank):
    """From du as it is stored, rounded; several chunks of rows and blocks of columns."""
    call = Call(tokens=70, columns=320, rank=rank, dtype=HALF)
    tensors = call.tensors()
    made = call.run(kernels(), tensors)
    du, b, z = made["du"].double(), tensors["b"].to(HALF).double(), tensors["z"].double()
    dz, db = SCALING * du @ b, SCALING * du.T @ z
    within_budget(made["dz"], dz.to(HALF), lambda: dz, HALF, "dz")
    within_budget(made["db"], db.float(), lambda: db, torch.float32, "db")
    assert made["dz"].is_contiguous() and made["dz"].dtype == HALF


@pytest.mark.parametrize("residual", [torch.float32, HALF])
def test_the_norm_of_a_sum_is_that_of_what_is_stored(path, residual):
    """So that the backward, which sees no more of it, starts from the same numbers."""
    call = Call(tokens=7, columns=300, dtype=HALF, residual=residual)
    t = call.tensors()
    norm = (t["weight"], t["bias"], EPS, HALF, t["a"])
    total, n, h = path.add_norm(t["x"], t["update"], *norm)
    assert torch.equal(total, t["x"] + t["update"])
    alone, h_alone = path.norm(total, *norm)
    assert torch.equal(n, alone)
    assert h is h_alone is None or torch.equal(h, h_alone)


@pytest.mark.slow_on_cpu("3", "8")
@pytest.mark.parametrize("narrow", [True, False], ids=["four at once", "two at once"])
@pytest.mark.parametrize("rank", [0, 3, 8])
def test_several_turns_of_a_program(rank, narrow, monkeypatch):
    """Each asks for the next turn's rows, or not; the last one's are fewer."""
    monkeypatch.setattr(costs, "MAX_PARTS", 3)
    monkeypatch.setattr(costs, "NARROW", 48 if narrow else 47)
    assert (costs.rows_at_once(48), costs.walked_rows(21, 48, True)) == (4 if narrow else 2, 8)
    Call(tokens=21, columns=48, rank=rank).check(kernels(), low_rank=True)


COLUMNS = pytest.mark.parametrize("columns", [100, 48])  # rows walked twice, and kept


@pytest.mark.slow_on_cpu("triton")
@COLUMNS
def test_far_from_zero(path, columns):
    """A variance from one pass of squares would be rounding alone, here as large as x's own."""
    for dtype in (torch.float32, HALF):
        call = Call(columns=columns, mean=1e3, spread=0.1, dtype=dtype)
        call.check(path, low_rank=path is not torch_path)


@COLUMNS
def test_constant_rows(path, columns):
    """Their variance is zero, and all of the LayerNorm is its bias."""
    call = Call(columns=columns, spread=0.0, mean=1e3, rank=0)
    tensors = call.tensors()
    tensors["x"][1::2] = 0.1
    tensors["x"][2::3] = 0.0
    ours = call.run(path, tensors)
    keep(call.budget(tensors), {name: ours[name] for name in ("n", "dx", "rows")}, some=True)
    assert torch.isfinite(ours["dx"]).all()


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize(
    ("columns", "dtype"), [(100, torch.float32), (100, HALF), (96, torch.float32)], ids=str
)
def test_a_row_of_nan_is_alone(path, columns, dtype):
    """Nothing of it reaches another row; lora_a's gradient, a sum over rows, is NaN."""
    call = Call(columns=columns, dtype=dtype)
    tensors, spoilt = call.tensors(), call.tensors()
    for name in ("x", "u"):
        spoilt[name][5, 7] = torch.nan
    clean, made = call.run(path, tensors), call.run(path, spoilt)
    others = torch.arange(call.tokens) != 5
    for name in set(made) - set(GRADIENTS):
        assert torch.equal(made[name][others], clean[name][others]), name
    assert made["n"][5].isnan().all() and made["dx"][5].isnan().all()
    assert made["rows"][5].isnan().all()
    assert made["g"][5].isnan().sum() == made["du"][5].isnan().sum() == 1
    if "h" in made:
        assert made["h"][5].isnan().all() and made["hg"][5].isnan().all()
        assert made["da_gelu"][:, 7].isnan().all()
    if "dz" in made:
        assert made["dz"][5].isnan().all() and made["db"][7].isnan().all()


@COLUMNS
def test_infinity_is_as_in_the_stock_norm(path, columns):
    call = Call(columns=columns, rank=0)
    tensors = call.tensors()
    tensors["x"][2, 0] = tensors["x"][3, 9] = torch.inf
    made, stock = call.run(path, tensors), call.literal(tensors, exact=False)
    for name in ("n", "dx"):
        assert torch.equal(made[name].isnan(), stock[name].isnan()), name


def test_no_tokens(path, guarded_kernels):
    for rank in (0, 3):
        made = Call(tokens=0, columns=48, rank=rank, dtype=HALF).run(path)
        assert made["n"].shape == made["dx"].shape == made["du"].shape == (0, 48)
        if "h" in made:
            assert made["h"].shape == (0, 3)
            assert not made["da_gelu"].any() and made["da_gelu"].shape == (3, 48)
    assert guarded_kernels is None or guarded_kernels.launches == 0


def test_only_incoming_gradients_are_written(path):
    """And the update, by the last addition; two of these hold a result."""
    call = Call(columns=48, dtype=HALF, residual=HALF)
    given = call.tensors()
    kept = {name: t.clone() for name, t in given.items()}
    norm = (given["weight"], given["bias"], EPS)
    low, back = (given["dh"], given["a"], True), (given["z"], given["b"], SCALING)
    up = given["z"], given["b"].t().contiguous(), SCALING
    path.norm(given["x"], *norm, HALF, given["a"])
    path.add_norm(given["x"], given["update"], *norm, HALF, given["a"])
    if call.takes_up(path):
        path.add_norm(given["x"], given["update"], *norm, HALF, given["a"], up)
    path.gelu(given["u"], given["a"], back)
    path.norm_backward(given["dn"], given["x"], *norm, given["residual"], low, True)
    path.gelu_backward(given["dg"], given["u"], low, True, back, None, back)
    changed = {name for name, t in given.items() if not torch.equal(t, kept[name])}
    assert changed <= {"dn", "dg", *(["update"] if path is torch_path else [])}


@pytest.mark.slow_on_cpu("triton-3")
@pytest.mark.parametrize("rank", [0, 3])
def test_rows_only_where_wanted(path, rank):
    """Those who get lora_a's gradient need no rows for it."""
    call = Call(columns=48, rank=rank)
    every, some = call.run(path), call.run(path, want=False)
    low_rank = rank > 0 and path is not torch_path
    assert ("rows" in some) == (rank > 0 and not low_rank)
    assert ("g_again" in some) == (rank > 0 and not low_rank)
    assert all(torch.equal(value, every[name]) for name, value in some.items())


def test_gradients_of_the_norm_s_own_parameters(path):
    call = Call(rank=0)
    t = call.tensors()

    def gradients(kind):
        leaves = [t[name].to(kind).requires_grad_() for name in ("weight", "bias")]
        n = F.layer_norm(t["x"].to(kind), (call.columns,), *leaves, EPS)
        return torch.autograd.grad(n, leaves, t["dn"].to(kind))

    stock, exact = (partial(gradients, t) for t in (torch.float32, torch.float64))
    ours = path.norm_parameters(t["dn"], t["x"], t["weight"], t["bias"], EPS, (True, True))
    all_within_budget(ours, stock, exact, torch.float32)
    only = path.norm_parameters(t["dn"], t["x"], t["weight"], t["bias"], EPS, (False, True))
    assert only[0] is None and torch.equal(only[1], ours[1])


@pytest.mark.slow_on_cpu("triton")
def test_three_runs_are_equal(path):
    call = Call(tokens=33, columns=48)
    first = call.run(path)
    for _ in range(2):
        assert all(torch.equal(v, first[name]) for name, v in call.run(path).items())
