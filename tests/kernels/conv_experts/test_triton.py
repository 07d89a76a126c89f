# SPDX-License-Identifier: Apache-2.0
"""conv_experts' Triton path against the specification: scales, sizes, channels and layouts."""

from functools import partial

import pytest
import torch
from budgets import all_within_budget

from samfast.kernels._common.windows import Windows

from .problems import RESULTS, Problem, not_interpreted

if not_interpreted():
    pytest.skip(not_interpreted(), allow_module_level=True)

from samfast.kernels.conv_experts import triton_kernels as kernels

SLOW = [pytest.mark.slow]  # what takes the interpreter long and repeats a quicker case at length
EIGHT = (1, 2, 3, 4, 5, 6, 7, 8)
EVERY_SCALE = [
    Problem(Windows.whole(8, 14, 14), 1, EIGHT),
    Problem(Windows.whole(8, 9, 13), 1, EIGHT, depthwise=True),
    Problem(Windows.whole(8, 1, 1), 1, EIGHT),
    Problem(Windows.whole(4, 3, 18), 1, (2, 5, 1, 4)),  # tiles with a halo
    pytest.param(Problem(Windows.whole(1, 17, 20), 1, (6,)), marks=SLOW),
]
CHANNELS = [
    Problem(Windows.whole(2, 14, 14), 3),
    pytest.param(Problem(Windows.whole(2, 14, 14), 4, (4, 7)), marks=SLOW),  # two to a program
    Problem(Windows.whole(2, 5, 4), 5, (8, 1), depthwise=True),
    Problem(Windows.whole(1, 18, 2), 2, (2,)),  # all channels in one program, tiles with a halo
    pytest.param(Problem(Windows.whole(1, 4, 3), 16, (2,)), marks=SLOW),
]
PADDED = Windows(1, 20, 17, 14, 14)
SMALL = Windows(1, 3, 4, 3, 2)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("problem", EVERY_SCALE + CHANNELS, ids=lambda problem: problem.id)
def test_values(problem):
    stock, exact = (partial(problem.literal, t) for t in (torch.float32, torch.float64))
    ours = problem.run(kernels, torch.float32)
    all_within_budget(ours, stock, exact, torch.float32, RESULTS)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=SLOW), torch.bfloat16]
)
def test_padded_windows(dtype):
    """Samples that hang over the image, one expert unused, kernels of another dtype than h."""
    problem = Problem(PADDED, ratios=(3, 2, 4), index=(0, 1, 1, 0))
    stock, exact = partial(problem.literal, dtype, dtype), partial(problem.literal, torch.float64)
    all_within_budget(problem.run(kernels, dtype), stock, exact, dtype, RESULTS)


def test_without_skip_and_activation():
    problem = Problem(SMALL, 1, (2,), residual=False, activation="none")
    stock, exact = (partial(problem.literal, t) for t in (torch.float32, torch.float64))
    all_within_budget(problem.run(kernels, torch.float32), stock, exact, torch.float32, RESULTS)


def test_unused_experts_have_zero_gradients():
    problem = Problem(Windows.whole(2, 3, 3), 1, (1, 2, 3), index=(2, 2))
    dweight, dbias = problem.run(kernels, torch.float32)[3:5]
    assert torch.equal(dweight[:2], torch.zeros_like(dweight[:2]))
    assert torch.equal(dbias[:2], torch.zeros_like(dbias[:2]))
    assert dweight[2].abs().min() > 0 and dbias[2].abs().min() > 0


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    "wrong", [2, *(pytest.param(n, marks=SLOW) for n in (-1, 2**40, -(2**40)))]
)
def test_unknown_expert_gives_nan_and_spoils_no_other_sample(wrong):
    right = Problem(Windows.whole(2, 3, 3), 1, index=(0, 1))
    spoiled = Problem(Windows.whole(2, 3, 3), 1, index=(wrong, 1))
    z, _, dh, dweight, dbias, *_ = spoiled.run(kernels, torch.float32)
    expected = right.run(kernels, torch.float32)
    assert z[:9].isnan().all() and dh[:9].isnan().all()
    assert torch.equal(z[9:], expected[0][9:]) and torch.equal(dh[9:], expected[2][9:])
    assert torch.equal(dweight[1], expected[3][1]) and torch.equal(dbias[1], expected[4][1])
    assert not dweight[0].any() and not dbias[0].any()


def test_huge_inputs_stay_finite():
    problem = Problem(Windows.whole(2, 3, 3), rank=1)
    h, weight, bias, dz, _, _ = problem.tensors(torch.float32, torch.float32)
    inputs = (h * 1e15, weight * 1e15, bias, problem.choices(), problem.windows, problem.ratios)
    z, _ = kernels.forward(*inputs, True, "gelu")
    grads = kernels.backward(dz, None, *inputs, True, "gelu", None, (True, True))
    assert all(t.isfinite().all() for t in (z, *grads[:3]))
    assert z.abs().max() > 1e29


def test_launches(guarded_kernels):
    problem = Problem(SMALL, rank=1)
    before = guarded_kernels.launches
    problem.run(kernels, torch.float32)
    assert guarded_kernels.launches - before == 3


@pytest.mark.slow_on_cpu(but=["True-needs0", "False-needs2"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("balanced", [True, False])
def test_only_what_is_needed(needs, balanced, guarded_kernels):
    problem = Problem(SMALL, rank=1)
    h, weight, bias, dz, _, balance = problem.tensors(torch.float32, torch.float32)
    inputs = (h, weight, bias, problem.choices(), problem.windows, problem.ratios, True, "gelu")
    every = kernels.backward(dz, None, *inputs, balance if balanced else None, (True, True))
    before = guarded_kernels.launches
    some = kernels.backward(dz, None, *inputs, balance if balanced else None, needs)
    assert guarded_kernels.launches - before == (2 if any(needs) else 1 if balanced else 0)
    wanted = (needs[0], needs[1], needs[1], balanced, balanced)
    for ours, expected, want in zip(some, every, wanted, strict=True):
        assert torch.equal(ours, expected) if want else ours is None


@pytest.mark.parametrize("balanced", [True, False])
def test_no_samples(balanced, guarded_kernels):
    problem = Problem(Windows.whole(0, 3, 3), rank=2)
    h, weight, bias, dz, dz_pad, balance = problem.tensors(torch.float16, torch.float32)
    inputs = (h, weight, bias, problem.choices(), problem.windows, problem.ratios, True, "gelu")
    z, z_pad = kernels.forward(*inputs)
    grads = kernels.backward(dz, dz_pad, *inputs, balance if balanced else None, (True, True))
    assert guarded_kernels.launches == 0
    assert z.shape == z_pad.shape == grads[0].shape == (0, 2) and grads[0].dtype == torch.float16
    assert torch.equal(grads[1], torch.zeros_like(weight))
    assert torch.equal(grads[2], torch.zeros_like(bias))
    assert (grads[3] is not None) == balanced


def test_scratch_is_a_small_multiple_of_h():
    for windows in (Windows.whole(1, 14, 14), Windows.whole(1, 64, 64), Windows.whole(1, 9, 13)):
        for rank in (1, 3, 4, 8, 16, 64):
            tile = kernels._tile(windows)
            copies = kernels.channel_chunks(windows, rank, False) * kernels._tiles(windows, tile)
            area = windows.height * windows.width
            assert copies * kernels.SOURCE**2 <= kernels.DH_COPIES * area
