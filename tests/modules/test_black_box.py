# SPDX-License-Identifier: Apache-2.0
"""Every low-rank module against the literal one, through the black-box checks."""

import black_box
import pytest
import torch
import torch.nn.functional as F
from black_box import Subject
from draws import DEVICE
from literal_cobot import LiteralCobot
from literal_task_lora import LiteralTaskLora
from torch import nn

from samfast.backends import triton_missing
from samfast.modules import CobotQkvLora, LoraLinear, QkvLora, TaskLoraLinear


class LiteralLora(nn.Linear):
    """LoRA as the paper writes it, in plain PyTorch; ``slices`` as in QkvLora."""

    def __init__(self, like, scaling, slices=None):
        super().__init__(like.in_features, like.out_features, dtype=torch.float64)
        self.lora_A = nn.Parameter(torch.empty_like(like.lora_A))
        self.lora_B = nn.Parameter(torch.empty_like(like.lora_B))
        self.scaling, self.slices = scaling, slices

    def forward(self, x):
        y = super().forward(x)
        if self.slices is None:
            return y + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)
        n, (start, stop) = len(self.slices), self.slices[0]
        updates = []
        for a, b in zip(self.lora_A.chunk(n), self.lora_B.split(stop - start), strict=True):
            updates.append(F.linear(F.linear(x, a), b))
        zero = torch.zeros_like(y[..., : stop - start])
        given = dict(zip(self.slices, updates, strict=True))
        thirds = [(i * (stop - start), (i + 1) * (stop - start)) for i in range(3)]
        return y + torch.cat([given.get(third, zero) for third in thirds], dim=-1)


def lora():
    ours = LoraLinear(40, 56, rank=4, alpha=8, dtype=torch.float64)
    nn.init.normal_(ours.lora_B)
    return ours, LiteralLora(ours, ours.scaling)


def qkv():
    ours = QkvLora(40, 60, rank=3, slices=("q", "v"), dtype=torch.float64)
    nn.init.normal_(ours.lora_B)
    return ours, LiteralLora(ours, 1.0, ours.ranges)


def cobot():
    ours = CobotQkvLora(40, 60, rank=4, index=1, dtype=torch.float64)
    for _, parameter in ours.adapter_parameters():
        nn.init.normal_(parameter)
    return ours, LiteralCobot(ours)


def tasks():
    """A task for each sample; the first two samples have one."""
    options = {"tasks": 3, "ranks": (5, 4, 2), "dropout": 0.0, "enabled": ("q", "v")}
    ours = TaskLoraLinear(40, 60, **options, dtype=torch.float64)
    nn.init.normal_(ours.td_G)
    ours.entries = torch.tensor([2, 2, 0])
    return ours, LiteralTaskLora(ours)


@pytest.mark.slow_on_cpu(
    "torch", "triton", "generated", "CobotQkvLora-compiled", "TaskLoraLinear-compiled"
)
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "make",
    [lora, qkv, cobot, tasks],
    ids=["LoraLinear", "QkvLora", "CobotQkvLora", "TaskLoraLinear"],
)
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_black_box(make, check, backend, monkeypatch):
    if backend == "triton" and (reason := triton_missing(DEVICE)):
        pytest.skip(reason)
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    torch.manual_seed(0)
    ours, stock = make()
    ours.weight.requires_grad_(False)
    ours.bias.requires_grad_(False)
    x = torch.randn(3, 5, 7, 40, dtype=torch.float64).to(DEVICE)
    subject = Subject(ours.to(DEVICE), stock.to(DEVICE), x)
    check(subject)
