# SPDX-License-Identifier: Apache-2.0
"""The branch against torch's own layers: values, each gradient, hard rows, what is refused."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget, assert_same_dtypes
from draws import DEVICE

from samfast.functional import adapt_former
from samfast.kernels._common.philox import keep_mask
from samfast.kernels.adapt_former.engine import supports

from .cases import BACKENDS, NAMES, Case, runnable

CASES = (
    Case(),
    Case(dropout=0.3),
    Case(shape=(2, 14, 14, 64), bottleneck=8),
    Case(shape=(70, 33), bottleneck=1, dropout=0.1),
    Case(shape=(1, 63, 48), bottleneck=5),
    Case(shape=(341, 16), bottleneck=64, dropout=0.5),
    Case(shape=(9,), bottleneck=2),
    Case(shape=(0, 4, 4, 24), dropout=0.2),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HARD = {
    "far": Case(mean=1e3, spread=0.1),
    "constant": Case(mean=5.0, spread=0.0),
    "zeros": Case(spread=0.0),
}


def check(case, backend, dtype):
    stock, exact = (partial(case.run, t, "literal") for t in (dtype, torch.float64))
    ours = case.run(dtype, backend)
    assert_same_dtypes(ours, all_within_budget(ours, stock, exact, dtype, NAMES))


@pytest.mark.slow_on_cpu("auto", "torch-torch.float16", "reference-torch.float16")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS, "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_budget(case, backend, dtype):
    if backend == "cpu" and DEVICE.type == "cuda":
        pytest.skip("the C++ backend takes CPU tensors")
    check(case, backend, dtype)


@pytest.mark.gpu  # the interpreter has cases of its own
@pytest.mark.skipif(runnable("triton") is not None, reason=str(runnable("triton")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *HARD.values()], ids=lambda case: case.id)
def test_triton(case, dtype):
    check(case, "triton", dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float64_is_exact(case):
    exact = partial(case.run, torch.float64, "literal")
    all_within_budget(case.run(torch.float64, "torch"), exact, exact, torch.float64, NAMES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", HARD)
def test_hard_rows(kind, dtype):
    """Whose variance is a small difference of large numbers, or nothing but eps."""
    check(HARD[kind], "auto", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_parameters_beside_a_narrow_base(backend):
    """Their gradients are float32; products are rounded as those of narrow parameters are."""
    case = Case(dropout=0.2)
    stock, exact = (partial(case.run, t, "literal") for t in (torch.bfloat16, torch.float64))
    ours = case.run(torch.bfloat16, backend, torch.float32)
    assert [t.dtype for t in ours] == [torch.bfloat16] * 3 + [torch.float32] * 6
    all_within_budget(ours, stock, exact, torch.bfloat16, NAMES)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("spoilt", [0, 1, "dy"], ids=["x", "base", "dy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_what_it_reaches_in_torch(backend, spoilt, value):
    case, results = Case(), []
    for which in (backend, "literal"):
        leaves, dy = case.tensors(torch.float32)
        given = dy if spoilt == "dy" else leaves[spoilt].detach()
        given[1, 2, 3, 4] = value
        y = case.call(leaves, which)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for name, ours, stock in zip(NAMES, *results, strict=True):
        assert torch.equal(ours.isfinite(), stock.isfinite()), name


def test_one_sample_of_nan_is_alone():
    case = Case()
    leaves, dy = case.tensors(torch.float32)
    clean = case.call(leaves)
    with torch.no_grad():
        leaves[0][1] = float("nan")
    y = case.call(leaves)
    (dx,) = torch.autograd.grad(y, leaves[0], dy)
    assert y[1].isnan().all() and torch.equal(y[::2], clean[::2])
    assert dx[1].isnan().all() and dx[::2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bottleneck", [16, 6])
def test_dropout_is_the_mask_of_philox(backend, bottleneck):
    """Each element of the bottleneck by itself, in the result and in the gradient."""
    case = Case(shape=(70, 8), bottleneck=bottleneck, dropout=0.4)
    leaves, _ = case.tensors(torch.float32)
    with torch.no_grad():
        for t in leaves[1:]:
            t.zero_()
        leaves[5].fill_(0.6)  # the bottleneck is one where it is kept
    keep = keep_mask(case.seed, 70, bottleneck, 0.4)
    assert 0 < keep.sum() < keep.numel()
    for column in range(bottleneck):
        with torch.no_grad():
            leaves[6].zero_()[0, column] = 1.0
        y = case.call(leaves, backend)
        assert torch.equal(y[:, 0].round(), keep[:, column].float())
        (dbias,) = torch.autograd.grad(y.sum(), leaves[5])
        assert (dbias[column] * 0.6).round() == keep[:, column].sum()
        assert dbias.count_nonzero() == 1


def test_a_call_without_a_seed_draws_a_new_one():
    leaves, _ = Case().tensors(torch.float32)
    torch.manual_seed(0)
    first, second = (adapt_former(*leaves, dropout=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, adapt_former(*leaves, dropout=0.5))
    assert not torch.equal(first, second)


def test_starts_as_the_base():
    """While up and its bias are zeros the result is the base, bit for bit."""
    for dtype in DTYPES:
        leaves, _ = Case().tensors(dtype)
        with torch.no_grad():
            leaves[6].zero_()
            leaves[7].zero_()
        assert torch.equal(adapt_former(*leaves, dropout=0.3), leaves[1])


@pytest.mark.parametrize(
    ("place", "change", "sentence"),
    [
        (1, lambda t: t[1:], r"base has shape \(2, 5, 7, 40\) but x has \(3, 5, 7, 40\)"),
        (1, lambda t: t.half(), "x is torch.float32 but base is torch.float16; cast base or"),
        (1, lambda t: t.to("meta"), "base is on meta but x is on"),
        (4, lambda t: t[:, 1:], r"down has shape \(16, 39\), but rows of 40 features need"),
        (4, lambda t: t[:0], r"down has shape \(0, 40\), but rows of 40 features need \(bott"),
        (2, lambda t: t[1:], r"norm_weight has shape \(39,\), but 40 features and a bottleneck"),
        (3, lambda t: t[None], r"norm_bias has shape \(1, 40\), .* need \(40,\)"),
        (5, lambda t: t[1:], r"down_bias has shape \(15,\), .* bottleneck of 16 need \(16,\)"),
        (6, lambda t: t.t(), r"up has shape \(16, 40\), .* need \(40, 16\)"),
        (7, lambda t: t[1:], r"up_bias has shape \(39,\)"),
        (7, lambda t: t.int(), "up_bias is torch.int32, but must be float16, bfloat16, float32"),
        (6, lambda t: t.to("meta"), "up is on meta but x is on"),
    ],
)
def test_arguments_that_do_not_fit(place, change, sentence):
    leaves = [t.detach() for t in Case().tensors(torch.float32)[0]]
    leaves[place] = change(leaves[place])
    with pytest.raises(ValueError, match=sentence):
        adapt_former(*leaves)


def test_bad_options():
    leaves, _ = Case().tensors(torch.float32)
    for dropout in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"dropout is {dropout}, but must be at least 0"):
            adapt_former(*leaves, dropout=dropout)
    with pytest.raises(ValueError, match=r"expected seed as one int64 element, got torch.float32"):
        adapt_former(*leaves, dropout=0.5, seed=torch.ones(1, device=DEVICE))
    with pytest.raises(ValueError, match=r"x has shape \(\), but must be \(..., D\)"):
        adapt_former(torch.ones((), device=DEVICE), *leaves[1:])
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        adapt_former(*leaves, backend="fast")


def test_supports(monkeypatch):
    x = torch.empty(2, 40)
    assert supports("torch", x, 999, torch.float64) is None
    assert "no C++ source" in supports("cpu", x, 16, x.dtype)
    assert "no CUDA source" in supports("cuda", x, 16, x.dtype)
    monkeypatch.setattr("samfast.backends.triton_missing", lambda device: None)
    assert supports("triton", x, 16, x.dtype) is None
    assert "torch.float64" in supports("triton", x.double(), 16, torch.float64)
    assert "bottleneck of 33 is above 32" in supports("triton", x, 33, torch.float32)
    assert supports("triton", x, 33, torch.bfloat16) is None
    monkeypatch.undo()
    leaves, _ = Case().tensors(torch.float64)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run adapt_former: "):
        adapt_former(*leaves, backend="triton")
