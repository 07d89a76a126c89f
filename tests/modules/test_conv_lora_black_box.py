# SPDX-License-Identifier: Apache-2.0
"""ConvLoraLinear against the literal module, through the black-box checks."""

import black_box
import pytest
import torch
from black_box import Subject
from draws import DEVICE
from literal_conv_lora import LiteralConvLora
from torch import nn

from samfast.backends import NAMES
from samfast.modules import ConvLoraLinear

SIZE = (5, 6)
INDEX = torch.tensor([3, 0, 1], device=DEVICE)  # a choice that rounding cannot change
NOISE = torch.tensor(
    [[0.3, -1.2, 0.1, 2.0], [1.5, -0.4, -2.1, 0.2], [-0.7, 1.9, 0.4, -1.1]], device=DEVICE
)


class Ours(ConvLoraLinear):
    """The balancing loss is added to the result, so that every check looks at its gradient."""

    def forward(self, x):
        options = {"noise": NOISE[: len(x)]} if self.training else {}
        y, loss = super().forward(x, expert_index=INDEX[: len(x)], return_aux=True, **options)
        return y + loss.to(y.dtype)


class Stock(LiteralConvLora):
    def forward(self, x):
        noise = NOISE[: len(x)] if self.training else None
        y, loss = super().forward(x, noise, INDEX[: len(x)])
        unused = 0 * (self.w_gate.sum() + self.w_noise.sum())  # in eval; ours has a zero gradient
        return y + (loss + unused).to(y.dtype)


INTERPRETED = (black_box.error_budget, black_box.empty_batch)
# What takes minutes in the interpreter.
LONG = [check.__name__ for check in black_box.CHECKS if check not in INTERPRETED]
CASES = [("auto", False), ("auto", True), ("torch", True), ("triton", False), ("triton", True)]


@pytest.mark.gpu(*(f"triton-{kind}-{name}" for kind in ("full", "depthwise") for name in LONG))
@pytest.mark.slow_on_cpu("triton", "generated", "torch-depthwise", "depthwise-compiled")
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("backend", "depthwise"), CASES, ids=[f"{b}-{'depthwise' if d else 'full'}" for b, d in CASES]
)
def test_black_box(check, backend, depthwise, monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    torch.manual_seed(1)
    ours = Ours(
        12, 18, rank=3, alpha=4, experts=4, ratios=(1, 2, 3, 8), depthwise=depthwise,
        device=DEVICE, dtype=torch.float64,
    )  # fmt: skip
    if backend == "triton":
        for choice in ours.float().backends().values():
            if choice not in NAMES:
                pytest.skip(choice)
    for name in ("lora_B", "expert_bias", "w_gate", "w_noise"):
        nn.init.normal_(ours.get_parameter(name))
    ours.weight.requires_grad_(False)
    ours.bias.requires_grad_(False)
    ours = ours.double()
    x = torch.randn(3, *SIZE, 12, dtype=torch.float64).to(DEVICE)
    subject = Subject(ours, Stock(ours), x)
    check(subject)
