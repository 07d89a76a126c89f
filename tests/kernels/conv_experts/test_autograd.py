# SPDX-License-Identifier: Apache-2.0
"""conv_experts as a layer calls it: in windows with padding, with a balance."""

import pytest
import torch
from draws import DEVICE

from .cases import BACKENDS, SMALL, runnable


@pytest.mark.slow_on_cpu("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_two_halves(backend):
    if reason := runnable(backend):
        pytest.skip(reason)
    (h, weight, bias), dz = SMALL.tensors(torch.float32)
    h, weight, bias = h.detach().reshape(-1, 2), weight.detach(), bias.detach()
    options = ([1, 5, 6, 3, 5], [1, 3], True, "gelu")
    index = torch.tensor([0, 1, 1, 0], device=DEVICE)
    forward = (h, weight, bias, index, *options, backend)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.samfast.conv_experts_forward, forward, test_utils=checks)
    balance = (torch.ones((), device=DEVICE), h.new_ones(4, 2), h.new_ones(2, 2, 2))
    backward = (dz.reshape(-1, 2), None, h, weight, bias, index, *options)
    for rest in ((*balance, [True, True]), (None, None, None, [True, False])):
        torch.library.opcheck(
            torch.ops.samfast.conv_experts_backward, (*backward, *rest, backend), test_utils=checks
        )
