# SPDX-License-Identifier: Apache-2.0
"""Dropout stores a seed, not a mask, and every backend draws the same one."""

import pytest
import torch
from draws import DEVICE

from samfast.functional import lora_linear
from samfast.kernels._common.philox import keep_mask, philox_words

from .cases import runnable


def test_philox_known_answers():
    """The published test vectors for zero, and for all bits set in counter and key."""
    zero = torch.tensor([0])
    assert [hex(v) for v in philox_words(zero, zero)[0].tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


def test_the_mask_keeps_the_right_share():
    keep = keep_mask(torch.tensor([3]), 2000, 501, 0.3).double()
    error = (0.3 * 0.7 / keep.numel()) ** 0.5
    assert abs(keep.mean().item() - 0.7) < 4 * error
    assert not torch.equal(keep[0], keep[1])


@pytest.mark.slow_on_cpu("33-triton")
@pytest.mark.slow_on_cpu("64-triton", "6-triton")
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("columns", [64, 33, 6])
def test_every_backend_draws_the_same_mask(backend, columns):
    if reason := runnable(backend):
        pytest.skip(reason)
    rows, p, seed = 70, 0.4, torch.tensor([2**62 + 12345], device=DEVICE)
    x = torch.ones(rows, columns, device=DEVICE, requires_grad=True)
    weight = torch.zeros(1, columns, device=DEVICE)
    expected = keep_mask(seed, rows, columns, p)
    for column in (0, 1, columns // 2 + 1, columns - 2, columns - 1):
        a = torch.zeros(1, columns, device=DEVICE)
        a[0, column] = 1.0 - p
        b = torch.ones(1, 1, device=DEVICE)
        y = lora_linear(x, weight, None, a, b, 1.0, dropout=p, seed=seed, backend=backend)
        (dx,) = torch.autograd.grad(y.sum(), x)
        kept = expected[:, column].to(y.dtype)
        assert torch.equal(y[:, 0].round(), kept)
        assert torch.equal(dx[:, column].round(), kept)
        assert dx.count_nonzero() == kept.count_nonzero()


def test_a_call_without_a_seed_draws_a_new_one():
    x, weight = torch.ones(40, 64), torch.zeros(1, 64)
    a, b = torch.ones(1, 64), torch.ones(1, 1)
    torch.manual_seed(0)
    first, second = (lora_linear(x, weight, None, a, b, 1.0, dropout=0.5) for _ in range(2))
    torch.manual_seed(0)
    third = lora_linear(x, weight, None, a, b, 1.0, dropout=0.5)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
