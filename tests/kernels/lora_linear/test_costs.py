# SPDX-License-Identifier: Apache-2.0
"""lora_linear's launches, syncs, bytes and saved bytes, asserted."""

import pytest
import torch
from draws import DEVICE

from samfast.counters import count, saved_bytes
from samfast.functional import lora_linear

from .cases import Case, runnable

T, D, O, R = 3 * 70, 40, 96, 4
CASE = Case(shape=(3, 70, D), out=O, rank=R)


def layer(dtype=torch.float32, backend="triton", **options):
    """A frozen linear layer with an adapter: (leaves that want gradients, forward, both)."""
    (x, weight, bias, a, b), dy = CASE.tensors(dtype, torch.float32)
    weight.requires_grad_(False)
    bias.requires_grad_(False)

    def forward():
        return lora_linear(x, weight, bias, a, b, 0.5, backend=backend, **options)

    def both():
        return torch.autograd.grad(forward(), [x, a, b], dy)

    return (x, weight, bias, a, b), forward, both


@pytest.mark.slow_on_cpu
@pytest.mark.skipif(runnable("triton") is not None, reason=str(runnable("triton")))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_eight_launches_and_no_sync(dtype, dropout):
    seed = torch.tensor([3], device=DEVICE)
    counts = count(layer(dtype, dropout=dropout, seed=seed)[2])
    assert counts.launches == {
        "down_kernel": 1,
        "addmm": 1,
        "up_kernel": 1,
        "up_backward_kernel": 1,
        "mm": 1,
        "down_backward_kernel": 1,
        "reduce_kernel": 2,
    }
    assert counts.total_launches <= 8
    assert counts.total_syncs == 0


@pytest.mark.skipif(runnable("triton") is not None, reason=str(runnable("triton")))
def test_casts_under_autocast_are_five_more():
    """x, W in the forward and again in the backward, b, dx: a float32 base under autocast."""
    (x, weight, bias, a, b), dy = CASE.tensors(torch.float32)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    dy = dy.half()

    def both():
        with torch.autocast(DEVICE.type, torch.float16):
            y = lora_linear(x, weight, bias, a, b, 0.5, backend="triton")
        return torch.autograd.grad(y, [x, a, b], dy)

    counts = count(both)
    assert counts.launches["_to_copy"] == 5
    assert counts.total_launches == 13


@pytest.mark.slow_on_cpu
def test_no_mask_and_no_bias_of_full_size():
    """Nothing larger than y is ever made, with dropout neither."""
    seed = torch.tensor([3], device=DEVICE)
    backend = "triton" if runnable("triton") is None else "cpu"
    counts = count(layer(backend=backend, dropout=0.1, seed=seed)[2])
    assert counts.largest <= 4 * T * O


def test_flops_of_the_torch_backend():
    counts = count(layer(backend="torch")[2])
    frozen = 4 * T * D * O
    assert counts.flops == frozen + 6 * T * D * R + 6 * T * O * R


@pytest.mark.slow_on_cpu(but=["0.1-torch", "0.1-cpu", "0.0-torch"])
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saved_bytes(backend, dropout):
    if reason := runnable(backend):
        pytest.skip(reason)
    (x, *parameters), forward, _ = layer(backend=backend, dropout=dropout)
    saved = saved_bytes(forward, [x, *parameters])
    h, seed = 4 * T * R, 8 if dropout else 0
    assert saved.hooks == h + seed
    assert saved.living == h + seed
    assert saved_bytes(forward, parameters).hooks == h + seed + 4 * T * D


def test_a_narrow_base_keeps_no_cast_weight():
    (x, weight, bias, a, b), _ = CASE.tensors(torch.float32)
    weight.requires_grad_(False)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        saved = saved_bytes(lambda: lora_linear(x, weight, bias, a, b, 0.5), [weight, bias, a, b])
    assert saved.hooks == 2 * T * D + 2 * T * R
