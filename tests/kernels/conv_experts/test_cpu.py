# SPDX-License-Identifier: Apache-2.0
"""The C++ path, and the CUDA blocks' code run on the CPU, against the literal recipe in float64.

``blocks`` runs what a GPU would run, item by item, in alternating order over poisoned memory.
"""

import types
from functools import partial

import pytest
import torch
from budgets import all_within_budget
from draws import drawing

from samfast import backends
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import cpu_path, cuda_path, reference

pytestmark = pytest.mark.skipif(
    backends.native_missing() is not None, reason=str(backends.native_missing())
)
RATIOS = tuple(range(1, 9))
NAMES = ("z", "z_pad", "dh", "dweight", "dbias", "dw_gate", "dw_noise")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["cpu", "blocks"])
def path(request, monkeypatch):
    if request.param == "blocks":
        native = torch.ops.samfast_native
        blocks = types.SimpleNamespace(
            conv_experts_forward=native.conv_experts_tiles_forward,
            conv_experts_backward=native.conv_experts_tiles_backward,
        )
        monkeypatch.setattr(cpu_path, "_native", blocks)
    return cpu_path


class Call:
    """One forward and backward with random tensors. The seed is kept small for odd shapes."""

    def __init__(
        self, windows, rank=3, depthwise=False, ratios=RATIOS, index=None, residual=True,
        activation="gelu", pads=True, balance=True,
    ):  # fmt: skip
        self.windows, self.rank, self.ratios = windows, rank, ratios
        self.residual, self.activation, self.pads = residual, activation, pads
        self.groups, self.balance = rank if depthwise else 1, balance
        draw = drawing(7, device="cpu")
        experts, n = len(ratios), windows.samples
        self.index = torch.arange(n) % experts if index is None else torch.tensor(index)
        weight = draw(experts, rank, rank // self.groups, 3, 3) * 0.4
        self.leaves = [draw(windows.tokens, rank), weight, draw(experts, rank)]
        self.dz, self.dz_pad = draw(windows.tokens, rank), draw(windows.batch * windows.pads, rank)
        self.loss = [draw(), draw(n, rank), draw(2, rank, experts)]

    def run(self, path, dtype=torch.float32, needs=(True, True)):
        h, *small = [t.float() for t in self.leaves]
        arguments = (h.to(dtype), *small, self.index, self.windows, self.ratios, self.residual)
        arguments += (self.activation,)
        z, z_pad = path.forward(*arguments)
        dz_pad = self.dz_pad.to(dtype) if self.pads else None
        balance = [t.float() for t in self.loss] if self.balance else None
        return [z, z_pad, *path.backward(self.dz.to(dtype), dz_pad, *arguments, balance, needs)]

    def literal(self, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in self.leaves]
        samples = self.windows.cut(leaves[0])
        out = reference.conv_experts(
            samples, *leaves[1:], self.index, self.ratios, residual=self.residual,
            activation=self.activation, groups=self.groups,
        )  # fmt: skip
        daux, dpool, dgate = (t.to(dtype) for t in self.loss)
        z, z_pad = self.windows.paste(out)
        total = (z * self.dz.to(dtype)).sum()
        if self.pads:
            total = total + (z_pad * self.dz_pad.to(dtype)).sum()
        if self.balance:
            total = total + daux * (samples.sum((1, 2)) * dpool).sum()
        grads = torch.autograd.grad(total, leaves, materialize_grads=True)
        return [z, z_pad, *grads, *(daux * dgate if self.balance else ())]

    def check(self, path, dtype=torch.float32):
        ours = [t for t in self.run(path, dtype) if t is not None]
        assert ours[0].dtype == ours[1].dtype == ours[2].dtype == dtype
        assert all(t.dtype == torch.float32 for t in ours[3:])
        names = NAMES[: len(ours)]
        stock, exact = (partial(self.literal, t) for t in (dtype, torch.float64))
        all_within_budget(ours, stock, exact, dtype, names)


@pytest.mark.slow_on_cpu("26-5", "2-3", "blocks-9-16")
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("height,width", [(14, 14), (9, 16), (1, 1), (2, 3), (26, 5)])
def test_every_ratio(height, width, ratio, depthwise, path):
    """Three samples of one ratio, two experts with it; maps of one tile and of several."""
    windows = Windows.whole(3, height, width)
    Call(windows, depthwise=depthwise, ratios=(ratio, ratio), index=[1, 0, 1]).check(path)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16])
def test_every_rank(rank, depthwise, path):
    Call(Windows.whole(4, 9, 10), rank, depthwise, ratios=(1, 2, 3, 8)).check(path)


@pytest.mark.parametrize("rank", [5, 33, 64])
def test_ranks_of_the_cpu_alone(rank):
    Call(Windows.whole(2, 4, 5), rank, ratios=(4, 5)).check(cpu_path)
    Call(Windows.whole(2, 4, 5), rank, True, ratios=(4, 5)).check(cpu_path)


@pytest.mark.slow_on_cpu("float16", "(14, 28)")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("image", [(20, 17), (14, 28), (5, 30), (33, 9)], ids=str)
def test_windows_with_pads_and_balance(image, dtype, path):
    Call(Windows(2, *image, 14, 14)).check(path, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"residual": False},
        {"activation": "none"},
        {"pads": False},
        {"balance": False},
        {"ratios": (3,)},
        {"ratios": (12, 2, 9, 16, 2)},
    ],
    ids=str,
)
def test_options(options, path):
    Call(Windows(1, 20, 17, 14, 14), **options).check(path)


def test_only_what_is_needed_is_made_and_its_bits_are_the_same(path):
    call = Call(Windows(1, 20, 17, 14, 14))
    everything = call.run(path)
    for need_h in (False, True):
        for need_weight in (False, True):
            made = call.run(path, needs=(need_h, need_weight))
            wanted = [True, True, need_h, need_weight, need_weight, True, True]
            for ours, full, want in zip(made, everything, wanted, strict=True):
                assert torch.equal(ours, full) if want else ours is None


def test_no_samples(path):
    results = Call(Windows.whole(0, 14, 14)).run(path)
    assert [tuple(t.shape) for t in results[:3]] == [(0, 3)] * 3
    assert not results[3].any() and not results[4].any()


def test_experts_without_a_sample_get_zero(path):
    _, _, _, dweight, dbias, *_ = Call(Windows.whole(2, 9, 9), index=[1, 6]).run(path)
    idle = [0, 2, 3, 4, 5, 7]
    assert not dweight[idle].any() and not dbias[idle].any()
    assert dweight[[1, 6]].all() and dbias[[1, 6]].all()


def test_bits_do_not_depend_on_the_number_of_threads():
    calls = [Call(Windows(1, 64, 40, 64, 40), index=[3]), Call(Windows(2, 70, 70, 14, 14))]
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append([t for call in calls for t in call.run(cpu_path)])
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_bits_repeat_and_nothing_given_is_written(path):
    call = Call(Windows(2, 20, 17, 14, 14))
    given = [t.clone() for t in (*call.leaves, call.dz, call.dz_pad, *call.loss, call.index)]
    first, second = call.run(path), call.run(path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    now = [*call.leaves, call.dz, call.dz_pad, *call.loss, call.index]
    assert all(torch.equal(a, b) for a, b in zip(given, now, strict=True))


def test_inputs_of_any_layout(path):
    call = Call(Windows.whole(2, 5, 6), ratios=(2, 5))
    dense = call.run(path)
    for name in ("dz", "dz_pad"):
        setattr(call, name, getattr(call, name).t().contiguous().t())
    call.leaves = [
        call.leaves[0].t().contiguous().t(),
        call.leaves[1].transpose(1, 4).contiguous().transpose(1, 4),
        call.leaves[2].t().contiguous().t(),
    ]
    call.loss[2] = call.loss[2].transpose(1, 2).contiguous().transpose(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(dense, call.run(path), strict=True))


@pytest.mark.parametrize("choice", [-1, 8])
def test_cpu_refuses_an_expert_that_does_not_exist(choice):
    call = Call(Windows.whole(2, 3, 3), index=[0, choice])
    with pytest.raises(RuntimeError, match=f"expert index {choice} of sample 1 is outside 0..7"):
        call.run(cpu_path)


@pytest.mark.parametrize("choice", [-1, 8, 2**40])
def test_blocks_answer_nan_to_an_expert_that_does_not_exist(choice, monkeypatch):
    native = torch.ops.samfast_native
    blocks = types.SimpleNamespace(
        conv_experts_forward=native.conv_experts_tiles_forward,
        conv_experts_backward=native.conv_experts_tiles_backward,
    )
    good = Call(Windows.whole(2, 9, 3), index=[0, 0])
    bad = Call(Windows.whole(2, 9, 3), index=[0, choice])
    monkeypatch.setattr(cpu_path, "_native", blocks)
    (z, _, dh, dweight, *_), (right, _, right_dh, *_) = bad.run(cpu_path), good.run(cpu_path)
    assert torch.equal(z[:27], right[:27]) and torch.equal(dh[:27], right_dh[:27])
    assert z[27:].isnan().all() and dh[27:].isnan().all()
    assert dweight.isfinite().all()


def test_large_values_stay_finite(path):
    call = Call(Windows.whole(8, 5, 5))
    call.leaves[0] *= 1e4
    results = call.run(path)
    assert results[0].abs().max() > 1e4
    assert all(t.isfinite().all() for t in results)


def test_cuda_says_why_it_cannot_run():
    h, weight = torch.empty(4, 3), torch.empty(8, 3, 3, 3, 3)
    assert cuda_path.missing(h, weight) == "h is on cpu, but the CUDA kernels need a CUDA device"
