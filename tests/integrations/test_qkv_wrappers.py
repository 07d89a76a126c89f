# SPDX-License-Identifier: Apache-2.0
"""SAMed's _LoRA_qkv in fused blocks: numbers, dtypes, as a drop-in; its look-alikes left alone."""

import copy
import functools

import black_box
import literal_wrappers as wrappers
import pytest
import torch
from black_box import Subject
from budgets import all_within_budget
from look_alikes import BUILDS, FORWARDS, on_rows, other
from peft_models import DEPTH, block_calls, maps, run, trunk
from torch import nn
from wrapped_models import as_exact_as, samed, wrapper

import samfast
from samfast.adapters.stand_in import whose

STATE = "fused: literal_wrappers' _LoRA_qkv"
KINDS = {"samed": wrappers._LoRA_qkv, "cobot": wrappers.CobotBaseline}
QUICK = ("windows-autocast", "windows-checkpointing", "windows-copies")


def in_block(position):
    """A block of the trunk, float64, next to its fused form."""
    stock = samed().double().blocks[position]
    ours = samfast.fuse(copy.deepcopy(stock))
    assert ours.block_problem() is None
    return Subject(ours, stock, maps(3, torch.float64))


@pytest.mark.slow_on_cpu(but=QUICK)
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("position", [0, 1], ids=["windows", "map"])
def test_black_box(position, check):
    check(in_block(position))


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient(kind):
    stock = samed(KINDS[kind])
    fused = samfast.fuse(copy.deepcopy(stock))
    assert block_calls(fused, maps()) == DEPTH
    assert [*fused.state_dict()] == [*stock.state_dict()]
    wanted = {name: p.requires_grad for name, p in stock.named_parameters()}
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == wanted
    assert {*samfast.report(fused).others.values()} == {STATE}
    as_exact_as(fused, stock, maps())


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("memory", ["balanced", "minimal"])
def test_every_memory(memory):
    stock = samed()
    fused = samfast.fuse(copy.deepcopy(stock), memory)
    assert block_calls(fused, maps()) == DEPTH
    as_exact_as(fused, stock, maps())


def test_a_layer_on_its_own():
    stock = nn.ModuleList([wrapper()])
    fused = samfast.fuse(copy.deepcopy(stock))
    assert samfast.report(fused).others == {"0": STATE}
    as_exact_as(fused[0], stock[0], maps())


def test_a_narrow_model():
    stock, x = samed().bfloat16(), maps(dtype=torch.bfloat16)
    fused = samfast.fuse(copy.deepcopy(stock))
    assert block_calls(fused, x) == DEPTH
    as_exact_as(fused, stock, x, torch.bfloat16)


def test_factors_of_another_dtype_than_the_base():
    """Under autocast they are cast as everything is; without it the owner's forward says no."""
    stock = samed()
    for block in stock.blocks:
        block.attn.qkv.qkv.bfloat16()
    fused = samfast.fuse(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16):
        assert block_calls(fused, maps()) == DEPTH
    assert [*samfast.report(fused).others.values()] == [
        "not fused: literal_wrappers' _LoRA_qkv has layers of bfloat16 and float32"
    ] * DEPTH
    for model in (stock, fused):
        with pytest.raises(RuntimeError, match="dtype"):
            model(maps())


@pytest.mark.slow_on_cpu
def test_ten_steps_of_training():
    """As near to float64 as the owner's comes."""

    def train(model, dtype):
        model = copy.deepcopy(model).to(dtype)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
        x = maps(dtype=dtype)
        for _ in range(10):
            loss = (model(x) - x.flip(1)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    stock = samed()
    fused = samfast.fuse(copy.deepcopy(stock))
    all_within_budget(
        train(fused, torch.float32),
        functools.partial(train, stock, torch.float32),
        functools.partial(train, stock, torch.float64),
        torch.float32,
    )


def test_unfuse_gives_the_same_bits():
    stock, x = samed(), maps()
    fused = copy.deepcopy(stock)
    before = [*fused.modules()]
    assert samfast.fuse(fused) is fused and samfast.fuse(fused) is fused
    assert all(a is b for a, b in zip(before, fused.modules(), strict=True))
    layer = fused.blocks[0].attn.qkv
    assert isinstance(layer, wrappers._LoRA_qkv) and layer.weight is layer.qkv.weight
    assert layer.dim == 32 and layer.w_identity.shape == (32, 32)
    samfast.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    for name, value in run(stock, x).items():
        assert torch.equal(run(fused, x)[name], value), name


def test_other_shapes_of_x_run_the_owners_forward():
    """SAMed's takes maps only, SAM-COBOT's rows as well."""
    rows = maps().flatten(1, 2)
    stock = nn.ModuleList([wrapper(kind) for kind in KINDS.values()])
    fused = samfast.fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        with pytest.raises(IndexError):
            model[0](rows)
    assert torch.equal(fused[1](rows), stock[1](rows))


def alike(module):
    """The module next to a trunk, fused, and how report has it."""
    stock = nn.ModuleDict({"trunk": trunk(), "odd": module}).eval()
    fused = samfast.fuse(copy.deepcopy(stock))
    kind = type(module)
    assert type(fused["odd"]) is kind
    assert samfast.report(fused).blocks["trunk.blocks.0"] == "fused"
    package = kind.__module__.partition(".")[0]
    state = samfast.report(fused).others["odd"]
    start = f"not fused: {whose(package)} _LoRA_qkv, which "
    assert state.startswith(start)
    return fused["odd"], state.removeprefix(start)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_forwards_of_other_programs(forward):
    module = other(forward)
    fused, reason = alike(module)
    assert reason.startswith(FORWARDS[forward])
    if forward is not on_rows:  # which cannot run on maps
        assert torch.equal(fused(maps()), module.eval()(maps()))


@pytest.mark.parametrize("make", BUILDS, ids=lambda make: make.__name__)
def test_builds_of_other_programs(make):
    _, reason = alike(make())
    assert reason == BUILDS[make]


def test_a_class_of_that_name_over_something_else_is_nothing_to_samfast():
    class _LoRA_qkv(nn.Module):
        def __init__(self):
            super().__init__()
            self.QKV = nn.Linear(4, 12)

    assert samfast.report(nn.Sequential(_LoRA_qkv())).others == {}


def hooked(layer):
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return "has hooks or a forward of its own"


def hooked_inside(layer):
    layer.linear_a_q.register_forward_hook(lambda module, args, y: 2 * y)
    return "has hooks or a forward of its own on linear_a_q"


def added_to(layer):
    layer.extra = nn.Linear(2, 2)
    return "has a child extra, which would be left out"


def replaced_inside(layer):
    layer.linear_b_v = nn.Sequential(layer.linear_b_v)
    return "has torch's Sequential as linear_b_v, not a plain nn.Linear"


@pytest.mark.parametrize("change", [hooked, hooked_inside, added_to, replaced_inside])
def test_what_is_changed_after_fuse_runs_the_owners_forward(change):
    stock = samed()
    fused = samfast.fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        reason = change(model.blocks[0].attn.qkv)
    assert samfast.report(fused).blocks["blocks.0"] == f"fused in parts: qkv {reason}"
    assert block_calls(fused, maps()) == DEPTH - 1
    as_exact_as(fused, stock, maps())


def test_a_patched_class_runs_as_it_is_patched(monkeypatch):
    fused, x = samfast.fuse(samed()), maps()
    kind = wrappers._LoRA_qkv
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
    stock = samed()
    assert block_calls(fused, x) == 0
    as_exact_as(fused, stock, x)
    state = samfast.report(fused).blocks["blocks.0"]
    assert state.startswith("fused in parts: qkv is not what its name says: its forward gives an")
    monkeypatch.undo()
    assert block_calls(fused, x) == DEPTH


def test_weights_that_are_replaced_are_the_ones_that_run():
    """As load_lora_parameters does it."""
    stock = samed()
    fused = samfast.fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        for block in model.blocks:
            layer = block.attn.qkv.linear_b_v
            layer.weight = nn.Parameter(layer.weight.detach() + 0.5)
    as_exact_as(fused, stock, maps())
