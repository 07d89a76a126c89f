# SPDX-License-Identifier: Apache-2.0
"""The gate's Triton path against the specification's autograd, under the guarded interpreter."""

import pytest
import torch
from budgets import all_within_budget
from draws import drawing

from samfast import backends
from samfast.kernels._common.windows import Windows
from samfast.kernels.expert_gate import reference

if torch.cuda.is_available() or backends.triton_missing(torch.device("cpu")):
    pytest.skip("beside a GPU test_gate runs the compiled kernels", allow_module_level=True)

from guarded import ORDERS, guarded

from samfast.kernels.expert_gate import triton_kernels as kernels

COEFFICIENT = 0.3
PADDED = Windows(2, 7, 5, 3, 3)


def draw(windows, rank, experts, dtype=torch.float64, seed=3):
    """h, w_gate, w_noise and noise."""
    normal = drawing(seed, device="cpu")
    h = normal(windows.tokens, rank).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weights = [normal(rank, experts).to(wide) for _ in range(2)]
    return h, *weights, normal(windows.samples, experts).to(wide)


def literal(windows, h, w_gate, w_noise, noise, index):
    """What a path returns, from the specification: (index, aux, dpool, dgate)."""
    cut = windows.cut(h.to(w_gate.dtype)).requires_grad_()
    weights = [t.requires_grad_() for t in (w_gate, w_noise)]
    forced = None if index is None else index[:, None]
    choice, _, aux = reference.expert_gate(cut, *weights, noise, forced, COEFFICIENT)
    if not aux.requires_grad:
        zeros = h.new_zeros(2, *w_gate.shape, dtype=w_gate.dtype)
        return choice[:, 0], aux, zeros.new_zeros(windows.samples, h.shape[1]), zeros
    dcut, *dweights = torch.autograd.grad(aux, [cut, *weights], materialize_grads=True)
    return choice[:, 0], aux, dcut[:, 0, 0], torch.stack(dweights)


def check(windows, rank, experts, dtype=torch.float32, noisy=True, forced=False, order="shuffled"):
    h, w_gate, w_noise, noise = draw(windows, rank, experts, dtype)
    noise = noise if noisy else None
    index = torch.arange(windows.samples) % experts if forced else None
    with guarded(order) as guard:
        ours = kernels.forward(h, w_gate, w_noise, noise, index, windows, COEFFICIENT)
    assert guard.launches == 2

    def run(kind):
        *given, noise = draw(windows, rank, experts, kind)
        return literal(windows, *given, noise if noisy else None, index)

    # the choices come from sums of different order, but none of these samples is that close
    assert torch.equal(ours[0], run(torch.float64)[0]) and ours[0].dtype == torch.int64
    assert all(t.dtype == torch.float32 for t in ours[1:])
    stock, exact = ((lambda t=t: run(t)[1:]) for t in (dtype, torch.float64))
    all_within_budget(ours[1:], stock, exact, dtype, ("aux", "dpool", "dgate"))


@pytest.mark.slow_on_cpu("True-forward", "True-reverse", "False-shuffled", "False-reverse")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("noisy", [True, False])
def test_orders(order, noisy):
    check(PADDED, 3, 8, noisy=noisy, order=order)


@pytest.mark.slow_on_cpu("dtype0")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs(dtype):
    check(PADDED, 3, 4, dtype)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("forced", [True, False])
def test_more_samples_than_a_block(forced):
    check(Windows.whole(70, 2, 3), 5, 4, forced=forced)


@pytest.mark.parametrize("experts", [1, 2, 13, 16])
def test_experts(experts):
    check(Windows.whole(6, 2, 2), 2, experts)


@pytest.mark.parametrize("rank", [1, 13, 16])
def test_ranks_and_maps_of_several_chunks(rank):
    check(Windows.whole(2, 30, 25), rank, 3)


def test_the_lowest_of_equals_is_chosen():
    windows = Windows.whole(3, 2, 2)
    h, w_gate, w_noise, _ = draw(windows, 2, 5, torch.float32)
    index, _, *grads = kernels.forward(h, w_gate * 0, w_noise, None, None, windows, 1.0)
    assert index.tolist() == [0, 0, 0]
    assert not any(t.any() for t in grads)


def test_nan_chooses_some_expert():
    windows = Windows.whole(2, 2, 2)
    h, w_gate, w_noise, noise = draw(windows, 2, 5, torch.float32)
    h[:4] = torch.nan
    index, aux, *_ = kernels.forward(h, w_gate, w_noise, noise, None, windows, 1.0)
    assert index[0] == 0 and 0 <= index[1] < 5
    assert aux.isnan()


def test_no_samples(guarded_kernels):
    windows = Windows.whole(0, 2, 2)
    h, w_gate, w_noise, noise = draw(windows, 2, 5, torch.float32)
    index, aux, dpool, dgate = kernels.forward(h, w_gate, w_noise, noise, None, windows, 1.0)
    assert guarded_kernels.launches == 0
    assert index.shape == (0,) and dpool.shape == (0, 2)
    assert aux == 0 and torch.equal(dgate, torch.zeros(2, 2, 5))
