# SPDX-License-Identifier: Apache-2.0
"""RelPosAttention, alone and in a SamBlock that runs in parts, through the black-box checks."""

import copy

import black_box
import pytest
from draws import DEVICE
from sam_layers import attention, block, subject
from test_black_box import LiteralLora
from torch import nn

from samfast.backends import NAMES
from samfast.modules import LoraLinear, RelPosAttention, SamBlock

SIZE = (5, 6)


def whole():
    """Every tensor is trained, the tables too."""
    return subject(attention(SIZE), 3, *SIZE)


def windows():
    """As attached: LoRA on qkv, of the rest the bias alone is trained; windows with padding."""
    stock = block(4)
    stock.requires_grad_(False)
    stock.attn.qkv.bias.requires_grad_(True)
    fused = SamBlock.from_block(copy.deepcopy(stock))
    fused.attn.qkv = LoraLinear.from_linear(fused.attn.qkv, rank=3)
    nn.init.normal_(fused.attn.qkv.lora_B, std=0.2)
    stock.attn.qkv = LiteralLora(fused.attn.qkv, fused.attn.qkv.scaling).to(DEVICE)
    return subject(stock, 3, *SIZE, ours=fused)


CASES = [
    pytest.param(make, backend, id=f"{kind}-{backend}", marks=marks)
    for make, kind in ((whole, "RelPosAttention"), (windows, "SamBlock"))
    for backend, marks in (
        ("auto", ()),
        ("torch", ()),
        ("triton", [pytest.mark.slow] if make is windows else ()),
    )
]
INTERPRETED = (black_box.error_budget, black_box.empty_batch)
# What takes minutes in the interpreter.
LONG = [check.__name__ for check in black_box.CHECKS if check not in INTERPRETED]


@pytest.mark.gpu(*(f"triton-{name}" for name in LONG))
@pytest.mark.slow_on_cpu("torch", "triton", "generated", "SamBlock-auto-compiled")
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("make", "backend"), CASES)
def test_black_box(make, check, backend, monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    monkeypatch.setattr(SamBlock, "block_problem", lambda self: "asked for")
    if backend == "triton":
        probe = RelPosAttention.from_attention(attention(SIZE)).float()
        if (choice := probe.backends()["relpos_attention"]) not in NAMES:
            pytest.skip(choice)
    layers = make()
    check(layers)
