# SPDX-License-Identifier: Apache-2.0
"""cobot_fold against its specification: values, gradients, launches, errors."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget, assert_same_dtypes, within_budget
from draws import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

from samfast.counters import count
from samfast.functional import cobot_fold
from samfast.kernels.cobot_fold import reference
from samfast.kernels.cobot_fold.op import supports

from .cases import BACKENDS, CASES, SMALL, Case, runnable

KERNELS = {"fold_kernel": 1, "fold_backward_kernel": 1, "shared_backward_kernel": 1}


def skip_unless(backend):
    if (reason := runnable(backend)) is not None:
        pytest.skip(reason)


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_budget(case, backend, dtype):
    skip_unless(backend)
    sources = case.sources(dtype)
    exact = partial(case.results, case.sources(dtype, then=torch.float64), "reference")
    ours = case.results(sources, backend)
    budget = all_within_budget(ours, partial(case.results, sources, "reference"), exact, dtype)
    assert_same_dtypes(ours, budget)


KINDS = {  # of c and p, gammas, heads, factors and biases
    "narrow-factors": (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float32),
    "narrow-biases": (torch.float32, torch.float32, torch.float32, torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16,) * 5,
    "all": (torch.float32, torch.float16, torch.bfloat16, torch.float16, torch.float32),
}


def of_kinds(sources, kinds):
    c, p, *lists = sources
    lists = [[t.to(kind) for t in ts] for ts, kind in zip(lists, kinds[1:], strict=True)]
    return [c.to(kinds[0]), p.to(kinds[0]), *lists]


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_mixed_dtypes(case, backend, kinds):
    """Each result and gradient in its own dtype, and within the budget of that."""
    skip_unless(backend)
    sources = of_kinds(case.sources(torch.bfloat16), kinds)
    exact = partial(case.results, of_kinds(sources, [torch.float64] * 5), "reference")
    stock = partial(case.results, sources, "reference")
    ours = case.results(sources, backend)
    of_kind, of_c = dict(zip(("gamma", "head", "factor", "bias"), kinds[1:], strict=True)), kinds[0]
    made = [of_kind["factor"]] * case.layers + [of_kind["bias"]] * case.layers * case.down
    lists = [kind for kind in kinds[1 : 5 if case.down else 4] for _ in range(case.layers)]
    assert [t.dtype for t in ours] == [*made, of_c, of_c, *lists]
    assert_same_dtypes(ours, all_within_budget(ours, stock, exact, torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = torch.ops.samfast.cobot_fold(*sources, case.first, case.down, backend)
    assert [f.dtype for f in fakes] == [of_kind["factor"], made[-1]]


def test_the_quaternion_head_is_a_hamilton_product():
    """For a quaternion x, x W is the product x̄ w̄ with its vector part negated, that is w x."""
    x, w = torch.randn(2, 4, dtype=torch.float64)
    r, i, j, k = w
    a, b, c, d = x

    def product():
        return torch.stack(
            [
                r * a - i * b - j * c - k * d,
                r * b + i * a + j * d - k * c,
                r * c - i * d + j * a + k * b,
                r * d + i * c - j * b + k * a,
            ]
        )

    ours = x @ reference.quaternion(w.view(4, 1, 1))
    within_budget(ours, product, product, torch.float64, "w x")


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_at_once_are_the_bits_of_each_alone(backend):
    """So that a recomputed layer, which folds alone, repeats what was folded for all."""
    skip_unless(backend)
    for case in (CASES[0], CASES[1]):
        c, p, *lists = case.sources(torch.float32)
        together = cobot_fold(c, p, *lists, down=case.down, backend=backend)
        for i in range(case.layers):
            own = [part[i : i + 1] for part in lists]
            alone = cobot_fold(c, p, *own, i * case.own, down=case.down, backend=backend)
            assert torch.equal(alone[0][0], together[0][i])
            assert not case.down or torch.equal(alone[1][0], together[1][i])


@pytest.mark.slow_on_cpu("v8-2x1of3-40rows-down")
@pytest.mark.slow_on_cpu("v4-2x2of4-40rows-up")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled kernels have no order to choose")
@pytest.mark.skipif(runnable("triton") is not None, reason=str(runnable("triton")))
@pytest.mark.parametrize(
    "case", [Case(4, 2, 2, 40, 4), Case(8, 2, 1, 40, 3, 1, down=True)], ids=str
)
def test_orders_of_programs(case):
    """No program reads what another of its launch writes: every order gives the same bits."""
    from guarded import ORDERS, guarded

    runs, sources = [], case.sources(torch.float32)
    for order in ORDERS:
        with guarded(order) as guard:
            runs.append(case.results(sources, "triton"))
        assert guard.launches == 3
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.slow_on_cpu("v16-3x1of3-33rows-down")
@pytest.mark.skipif(runnable("triton") is not None, reason=str(runnable("triton")))
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_launches_and_syncs(case):
    """However many layers there are."""
    sources = case.sources(torch.float32)
    counts = count(lambda: case.results(sources, "triton"))
    ours = {name: n for name, n in counts.launches.items() if "kernel" in name}
    assert ours == KERNELS
    assert counts.total_syncs == 0


def test_bad_input():
    c, p, gammas, heads, factors, _ = CASES[0].sources(torch.float32)
    with pytest.raises(ValueError, match=r"slices 2 to 7 are outside the relation matrix p"):
        cobot_fold(c, p, gammas, heads, factors, (), 2)
    with pytest.raises(ValueError, match=r"c has shape \(1, 3, 6\), but must be \(1, V, S\)"):
        cobot_fold(c[:, :3], p, gammas, heads, factors)
    with pytest.raises(ValueError, match=r"p has shape \(5, 6\), but c has 6 slices"):
        cobot_fold(c, p[:5], gammas, heads, factors)
    with pytest.raises(ValueError, match=r"a head has shape \(1, 4, 1, 1\), but must be"):
        cobot_fold(c, p, gammas, [heads[0], heads[1][:1], heads[2]], factors)
    with pytest.raises(ValueError, match="3 gammas, 2 heads"):
        cobot_fold(c, p, gammas, heads[:2], factors)
    assert "has no native source" in supports("cpu", c, factors[0])


@pytest.mark.skipif(runnable("triton") is not None, reason=str(runnable("triton")))
def test_what_the_kernels_count_in_int32():
    """The elements of P, of which only slices is known here."""
    factor = torch.empty(8, 8, device=DEVICE)
    for slices, fits in ((46340, True), (46341, False)):
        sentence = supports("triton", factor[:1, :, None].expand(1, 8, slices), factor)
        assert (sentence is None) == fits
    assert sentence == "P of 46341×46341 slices has more elements than int32 can count"
