# SPDX-License-Identifier: Apache-2.0
"""PHMLinear and QuaternionLinear against the literal forms, through the black-box checks."""

import black_box
import pytest
import torch
import torch.nn.functional as F
from black_box import Subject
from draws import DEVICE
from torch import nn

from samfast.backends import triton_missing
from samfast.modules import PHMLinear, QuaternionLinear


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


class LiteralFactored(LiteralPhm):
    """As two products, one with a matrix that is mostly zeros: an infinity among x, where the loss
    is lost anyway, makes all of the rules' gradient NaN."""

    def __init__(self, like, products=False):
        nn.Module.__init__(self)
        self.products = products
        for name, parameter in like.named_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty_like(parameter)))

    def forward(self, x):
        if not self.products:
            with torch.autocast(x.device.type, enabled=False):
                parts = zip(self.rules, self.left, self.right, strict=True)
                h = sum(torch.kron(a, u @ v.mT) for a, u, v in parts)
            return F.linear(x, h, self.bias)
        eye = torch.eye(self.rules.shape[1], dtype=x.dtype)
        a = torch.cat([torch.kron(eye, v.t().contiguous()) for v in self.right])
        b = torch.cat([torch.kron(r, u) for r, u in zip(self.rules, self.left, strict=True)], 1)
        return F.linear(F.linear(x, a), b, self.bias)


def factored():
    ours = PHMLinear(12, 18, 2, 1, dtype=torch.float64)
    return ours, LiteralFactored(ours)


def quaternion():
    ours = QuaternionLinear(12, 20, dtype=torch.float64)
    return ours, LiteralQuaternion(ours)


KINDS = {"PHMLinear": phm, "PHMLinear-factored": factored, "QuaternionLinear": quaternion}


@pytest.mark.slow_on_cpu(
    "triton",
    "generated",
    "torch-PHMLinear-factored",
    "torch-QuaternionLinear",
    "auto-PHMLinear-factored-compiled",
    "auto-QuaternionLinear-compiled",
)
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
    if check is black_box.infinities and isinstance(stock, LiteralFactored):
        stock.products = True
    check(Subject(ours.to(DEVICE), stock.to(DEVICE), x))
