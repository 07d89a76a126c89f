# SPDX-License-Identifier: Apache-2.0
"""An operation that is all of a checkpoint: its own backward starts the recomputation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from samfast.functional import conv_experts, relpos_attention, window_relpos_attention


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def attention():
    q, tables = draw(1, 2, 3, 3, 16), (draw(5, 16), draw(5, 16))
    return lambda q: relpos_attention(q, q, q, *tables), q


def windows():
    tables = (draw(5, 16), draw(5, 16))
    return lambda qkv: window_relpos_attention(qkv, 2, 3, *tables), draw(1, 4, 4, 96)


def experts():
    weight, bias, index = draw(2, 3, 3, 3, 3), draw(2, 3), torch.tensor([1, 0])
    return lambda h: conv_experts(h, weight, bias, index, [1, 2]), draw(2, 4, 4, 3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [attention, windows, experts])
def test_gradients(make, reentrant):
    call, x = make()
    plain = torch.autograd.grad(call(x).square().sum(), x)[0]
    checkpoint(call, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, plain)
