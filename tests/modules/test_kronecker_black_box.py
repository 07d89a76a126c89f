# SPDX-License-Identifier: Apache-2.0
"""KroneckerLinear against the literal form, through the black-box checks."""

import black_box
import pytest
import torch
from black_box import Subject
from draws import DEVICE
from literal_kronecker import LiteralFactors, LiteralKronecker, filled

from samfast.backends import triton_missing
from samfast.modules import KroneckerLinear


@pytest.mark.slow_on_cpu("triton", "generated", "torch")
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_black_box(check, backend, monkeypatch):
    if backend == "triton" and (reason := triton_missing(DEVICE)):
        pytest.skip(reason)
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    torch.manual_seed(0)
    ours = filled(KroneckerLinear(12, 18, n=2, rank=2, alpha=3, dtype=torch.float64))
    ours.weight.requires_grad_(False)
    ours.bias.requires_grad_(False)
    x = torch.randn(3, 5, 12, dtype=torch.float64).to(DEVICE)
    subject = Subject(ours.to(DEVICE), LiteralKronecker(ours).to(DEVICE), x)
    if check is black_box.infinities:
        subject = Subject(ours, LiteralFactors(ours), x)
    check(subject)
