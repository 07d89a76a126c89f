# SPDX-License-Identifier: Apache-2.0
"""What a fused block remembers from forward to forward is asked anew once anything changed."""

import copy
import gc
import io
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samfast
from samfast.fused import remembered
from samfast.fused.sam_block import Block, SamBlock
from samfast.methods.conv_lora.layer import ConvLoraLinear
from samfast.methods.lora.layer import LoraLinear
from samfast.methods.lora.qkv_layer import QkvLora

DIM = 32


def block(kind=LoraLinear, **options):
    """A fused block whose qkv and lin1 are adapted, and an input."""
    torch.manual_seed(0)
    made = Block(DIM, 2, use_rel_pos=True, window_size=3, input_size=(3, 3)).requires_grad_(False)
    made.attn.qkv = kind.from_linear(made.attn.qkv, 2, **options)
    made.mlp.lin1 = LoraLinear.from_linear(made.mlp.lin1, 2)
    for p in made.parameters():
        nn.init.normal_(p, std=0.2)
    return SamBlock.from_block(made), torch.randn(2, 4, 5, DIM)


def remembers(module, x):
    return remembered.Remembered.of(module).latest(module, x) is not None


def run(module, x):
    """The result and gradients, or the sentence of what is raised."""
    torch.manual_seed(1)
    trained = [p for p in module.parameters() if p.requires_grad]
    x = x.detach().requires_grad_()
    try:
        y = module(x)
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    return [y.detach(), *torch.autograd.grad(y.float().sum(), [x, *trained], allow_unused=True)]


def same(found, expected):
    if isinstance(expected, str):
        return found == expected
    pairs = zip(found, expected, strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def set_(path, value):
    def change(module):
        *parents, name = path.split(".")
        setattr(module.get_submodule(".".join(parents)), name, value(module))

    return change


def hook(where, what):
    def change(module):
        part = module.get_submodule(where)
        getattr(part, f"register_forward_{what}")(
            (lambda m, args: tuple(2 * a for a in args)) if what == "pre_hook"
            else (lambda m, args, y: 2 * y)
        )  # fmt: skip

    return change


def other_parameter(module):
    module.attn.qkv.lora_A = nn.Parameter(module.attn.qkv.lora_A.detach() + 1)


def narrow(module):
    module.mlp.lin1.weight.data = module.mlp.lin1.weight.data.half()


def longer(module):
    for table in (module.attn.rel_pos_h, module.attn.rel_pos_w):
        table.data = torch.nn.functional.interpolate(table.data.T[None], 9)[0].T


class Own(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        made = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * made if func is F.linear else made


def subclass(module):
    weight = nn.Parameter(module.attn.proj.weight.detach().as_subclass(Own), requires_grad=False)
    torch.utils.swap_tensors(module.attn.proj.weight, weight)


def transposed(module):
    weight = module.attn.proj.weight
    weight.data = weight.data.t()


CHANGES = {
    "hook on mlp": hook("mlp", "hook"),
    "hook on a layer": hook("attn.qkv", "pre_hook"),
    "hook on a norm": hook("norm2", "hook"),
    "hook on the activation": hook("mlp.act", "hook"),
    "backward hook": lambda m: m.attn.register_full_backward_hook(lambda *_: None),
    "forward of an instance": set_(
        "mlp.forward", lambda m: types.MethodType(lambda s, x: 0 * x, m.mlp)
    ),
    "another layer": set_("attn.proj", lambda m: Doubling(DIM, DIM)),
    "a plain layer for an adapter": set_("mlp.lin1", lambda m: nn.Linear(DIM, 4 * DIM)),
    "another activation": set_("mlp.act", lambda m: nn.ReLU()),
    "the other GELU": set_("mlp.act.approximate", lambda m: "tanh"),
    "eps": set_("norm1.eps", lambda m: 0.1),
    "scale": set_("attn.scale", lambda m: 1.5),
    "heads": set_("attn.num_heads", lambda m: 1),
    "alpha": set_("attn.qkv.alpha", lambda m: 8.0),
    "a window": set_("window_size", lambda m: 0),
    "memory": set_("memory", lambda m: "minimal"),
    "another parameter": other_parameter,
    "narrow data": narrow,
    "transposed data": transposed,
    "values in place": lambda m: m.mlp.lin2.weight.data.mul_(2),
    "frozen": lambda m: m.attn.qkv.lora_A.requires_grad_(False),
    "unfrozen": lambda m: m.mlp.lin2.weight.requires_grad_(True),
    "merged, in evaluation": lambda m: (m.eval(), m.attn.qkv.merge()),
    "no bias": set_("attn.proj.bias", lambda m: None),
    "a norm without bias": set_("norm1.bias", lambda m: None),
    "no positions": set_("attn.use_rel_pos", lambda m: False),
    "another backend": set_("attn.backend", lambda m: "torch"),
    "a child more": lambda m: m.mlp.add_module("extra", nn.Linear(2, 2)),
    "another class": lambda m: setattr(m.mlp, "__class__", type("Mlp", (type(m.mlp),), {})),
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "other positions": longer,
    "a subclass": subclass,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_changes_are_seen(change):
    """As a block does that has remembered nothing."""
    module, x = block()
    before = run(module, x)
    assert not isinstance(before, str) and remembers(module, x)
    change(module)
    x = x.double() if change is CHANGES["double"] else x
    found = run(module, x)
    remembered.forget()
    assert same(found, run(module, x))
    if change not in (CHANGES["memory"], CHANGES["another backend"], CHANGES["backward hook"],
                      CHANGES["a child more"], CHANGES["another class"]):  # fmt: skip
        assert isinstance(found, str) or len(found) != len(before) or not same(found, before)


def test_what_is_remembered_holds():
    module, x = block()
    for _ in range(3):
        first = run(module, x)
        assert remembers(module, x)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    assert remembers(module, x) and not same(run(module, x), first)
    assert remembers(module, torch.randn(7, 4, 5, DIM))
    assert not remembers(module, torch.randn(2, 5, 5, DIM))
    assert not remembers(module, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not remembers(module, x)
        assert module(x).dtype == torch.float32 and remembers(module, x)
    assert remembers(module, x)
    for size in range(6, 6 + remembered.MOST):
        module(torch.randn(1, size, 5, DIM))
    assert not remembers(module, x)


def test_code_that_is_replaced_is_seen(monkeypatch):
    module, x = block()
    run(module, x)
    assert remembers(module, x)
    stock = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: 2 * stock(self, x))
    found = module(x)
    monkeypatch.undo()
    assert not torch.allclose(found, module(x))


def test_the_variable_is_seen(monkeypatch):
    module, x = block()
    run(module, x)
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not remembers(module, x)


def test_dropout_draws_each_time():
    """In training; and evaluation has none."""
    module, x = block(dropout=0.5)
    module.train()
    drawn = [module(x) for _ in range(3)]
    assert not torch.equal(drawn[1], drawn[2])
    module.eval()
    assert torch.equal(module(x), module(x))
    module.train()
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)


@pytest.mark.parametrize("kind", [QkvLora, ConvLoraLinear])
def test_other_adapters(kind):
    """As a block that remembers nothing; Conv-LoRA draws its noise and keeps its loss."""
    module, x = block(kind)
    module.train()
    for _ in range(3):
        found = run(module, x)
        loss = samfast.aux_loss(module) if kind is ConvLoraLinear else None
        assert remembers(module, x)
        remembered.forget()
        assert same(found, run(module, x))
        if loss is not None:
            assert loss.item() == samfast.aux_loss(module).item() > 0
    if kind is ConvLoraLinear:
        module.attn.qkv.eval()  # without noise, in a block that trains
        found = run(module, x)
        remembered.forget()
        assert same(run(module, x), found)
        module.attn.qkv.register_forward_hook(lambda m, args, y: 2 * y)
        assert not same(run(module, x), found)


def test_copies_and_pickles_remember_nothing():
    module, x = block()
    expected = run(module, x)
    others = [copy.deepcopy(module)]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    others.append(torch.load(file, weights_only=False))
    for other in others:
        assert not remembered.Remembered.of(other).answers
        assert same(run(other, x), expected) and remembers(other, x)
        with torch.no_grad():
            other.mlp.lin2.weight.zero_()
        assert not same(run(other, x), expected) and same(run(module, x), expected)
    assert remembered.Remembered.of(module._replicate_for_data_parallel()) is None


def test_nothing_is_kept():
    """Neither a block nor a Parameter that was replaced, nor a graph."""
    gc.collect()
    gc.disable()
    try:
        module, x = block(ConvLoraLinear)
        module.eval()  # in training the loss of the latest forward keeps its graph
        for _ in range(3):
            module(x)
        assert remembers(module, x)
        old = weakref.ref(module.attn.proj.weight)
        module.attn.proj.weight = nn.Parameter(torch.zeros(DIM, DIM))
        assert old() is None
        weights = {n: p * 1 for n, p in module.named_parameters()}
        graph = weakref.ref(weights["attn.qkv.lora_A"])
        for _ in range(2):
            torch.func.functional_call(module, weights, (x,))
        del weights
        assert graph() is None
        kept = [weakref.ref(p) for p in module.parameters()]
        del module
        assert not [ref for ref in kept if ref() is not None]
    finally:
        gc.enable()


def test_blocks_that_change_at_each_forward():
    """That is given up, tried now and then, and holds once they stay; Parameters may change."""
    module, x = block()
    for _ in range(remembered.MOST_MISSES + 3):
        module.mlp.act = nn.GELU()
        run(module, x)
    assert not remembers(module, x)
    for _ in range(remembered.SELDOM):
        module(x)
    assert remembers(module, x)
    module.mlp.lin2.weight = nn.Parameter(torch.zeros(DIM, 4 * DIM), requires_grad=False)
    assert remembers(module, x)
    found = run(module, x)
    remembered.forget()
    assert same(run(module, x), found)


def test_a_trace_is_refused_as_before():
    module, x = block()
    run(module, x)
    with pytest.raises(RuntimeError, match="do not support samfast's operators"):
        torch.jit.trace(module, x)


def test_a_wrong_shape_is_still_a_sentence():
    """Kernels would read beyond it."""
    module, x = block()
    run(module, x)
    module.attn.qkv.lora_A.data = torch.zeros(2, DIM - 1)
    with pytest.raises(ValueError, match=r"lora_a \(2, 31\) and lora_b .* do not fit"):
        module(x)
    assert F.linear(x, module.norm1.weight[None]).shape == (2, 4, 5, 1)
