# SPDX-License-Identifier: Apache-2.0
"""PEFT's lora.Linear in fused blocks: numbers, dtypes, training, dropout, and as a drop-in."""

import copy

import black_box
import peft
import pytest
import torch
from black_box import Subject
from budgets import all_within_budget, assert_same_dtypes
from peft_models import DEPTH, adapted, block_calls, config, maps, moved, run, trunk
from torch import nn

import samfast


def in_block(position):
    """A block of the trunk, float64, PEFT's layers injected, next to its fused form."""
    stock = trunk().blocks[position].double()
    moved(peft.inject_adapter_in_model(config(), stock))
    ours = samfast.fuse(copy.deepcopy(stock))
    assert ours.block_problem() is None
    return Subject(ours, stock, maps(3, torch.float64))


def as_exact_as(fused, stock, x):
    """Result and every gradient in the budget of the eager model, float32."""
    double = copy.deepcopy(stock).double()
    all_within_budget(
        run(fused, x), lambda: run(stock, x), lambda: run(double, x.double()), torch.float32
    )


@pytest.mark.slow_on_cpu("map", "windows-generated", "windows-expanded", "windows-compiled")
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("position", [0, 1], ids=["windows", "map"])
def test_black_box(position, check):
    check(in_block(position))


@pytest.mark.parametrize("memory", ["fast", "balanced", "minimal"])
def test_every_gradient_of_a_peft_model(memory):
    stock = adapted()
    fused = samfast.fuse(copy.deepcopy(stock), memory)
    assert block_calls(fused, maps()) == DEPTH
    assert [*fused.state_dict()] == [*stock.state_dict()]
    wanted = {name: p.requires_grad for name, p in stock.named_parameters()}
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == wanted
    as_exact_as(fused, stock, maps())


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_narrow_base(factors):
    """get_peft_model keeps factors in float32, inject_adapter_in_model in the base's dtype."""
    base = trunk().bfloat16()
    if factors == torch.float32:
        stock = moved(peft.get_peft_model(base, config()))
    else:
        stock = moved(peft.inject_adapter_in_model(config(), base))
    assert {p.dtype for n, p in stock.named_parameters() if "lora_" in n} == {factors}
    fused = samfast.fuse(copy.deepcopy(stock))
    x = maps(dtype=torch.bfloat16)
    assert block_calls(fused, x) == DEPTH
    double = copy.deepcopy(stock).double()
    ours = run(fused, x)
    budget = all_within_budget(
        ours, lambda: run(stock, x), lambda: run(double, x.double()), torch.bfloat16
    )
    assert_same_dtypes(ours, budget)


@pytest.mark.slow_on_cpu
def test_ten_steps_of_training():
    """As near to float64 as eager PEFT comes."""

    def train(model, dtype):
        model = copy.deepcopy(model).to(dtype)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
        x = maps(dtype=dtype)
        for _ in range(10):
            loss = (model(x) - x.flip(1)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        return {"loss": loss.detach(), **trained}

    stock = adapted()
    ours = train(samfast.fuse(copy.deepcopy(stock)), torch.float32)
    assert not torch.equal(ours["loss"], train(stock, torch.float64)["loss"])
    all_within_budget(
        ours,
        lambda: train(stock, torch.float32),
        lambda: train(stock, torch.float64),
        torch.float32,
    )


def test_scaling_is_read_at_every_forward():
    stock = adapted(use_rslora=True)
    fused, x = samfast.fuse(copy.deepcopy(stock)), maps()
    for model in (stock, fused):
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("default", 3.0)
    as_exact_as(fused, stock, x)


def test_dropout_acts_in_training_only():
    stock = adapted(lora_dropout=0.5)
    fused, x = samfast.fuse(copy.deepcopy(stock)).train(), maps()
    assert block_calls(fused, x) == DEPTH
    assert not torch.equal(fused(x), fused(x))
    stock.eval(), fused.eval()
    assert torch.equal(fused(x), fused(x))
    as_exact_as(fused, stock, x)


def test_dropout_has_the_same_distribution():
    """Over a base of zeros, with factors of one, a layer gives what dropout leaves of x."""
    layer = nn.Sequential(nn.Linear(8, 8))
    layer = peft.get_peft_model(
        layer, peft.LoraConfig(r=8, lora_alpha=8, lora_dropout=0.25, target_modules=["0"])
    )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.eye(8) if "lora_" in name else torch.zeros(parameter.shape))
    y = samfast.fuse(layer).train()(torch.ones(4000, 8))
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75))
    assert abs(kept.double().mean() - 0.75) < 5 * (0.25 * 0.75 / y.numel()) ** 0.5
