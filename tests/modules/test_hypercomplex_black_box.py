# SPDX-License-Identifier: Apache-2.0
"""PHMLinear and QuaternionLinear against the literal forms, through the black-box checks."""

import black_box
import pytest
import torch
import torch.nn.functional as F
from black_box import Subject
from torch import nn

from samfast.backends import triton_missing
from samfast.modules import PHMLinear, QuaternionLinear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class LiteralPhm(nn.Module):
    """The formula as the paper writes it."""

    def __init__(self, like):
        super().__init__()
        self.rules, self.weights = (
            nn.Parameter(torch.empty_like(t)) for t in (like.rules, like.weights)
        )
        self.bias = nn.Parameter(torch.empty_like(like.bias))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            h = sum(torch.kron(a, s) for a, s in zip(self.rules, self.weights, strict=True))
        return F.linear(x, h, self.bias)


class LiteralQuaternion(nn.Module):
    """The block rows as SAM-COBOT's authors put them together."""

    def __init__(self, like):
        super().__init__()
        for name, parameter in like.named_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty_like(parameter)))

    def forward(self, x):
        r, i, j, k = self.r_weight, self.i_weight, self.j_weight, self.k_weight
        rows = [[r, i, j, k], [-i, r, k, -j], [-j, -k, r, i], [-k, j, -i, r]]
        w = torch.cat([torch.cat(row, dim=1) for row in rows], dim=0)
        return F.linear(x, w.t(), self.bias)


def phm():
    ours = PHMLinear(12, 18, 3, dtype=torch.float64)
    return ours, LiteralPhm(ours)


def quaternion():
    ours = QuaternionLinear(12, 20, dtype=torch.float64)
    return ours, LiteralQuaternion(ours)


KINDS = {"PHMLinear": phm, "QuaternionLinear": quaternion}


@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_black_box(make, check, backend, monkeypatch):
    if backend == "triton" and (reason := triton_missing(DEVICE)):
        pytest.skip(reason)
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    torch.manual_seed(0)
    ours, stock = make()
    x = torch.randn(3, 5, 12, dtype=torch.float64).to(DEVICE)
    check(Subject(ours.to(DEVICE), stock.to(DEVICE), x))
