# SPDX-License-Identifier: Apache-2.0
"""Blocks of copies of segment_anything, of transformers and of timm, as one operator each."""

import copy
import subprocess
import sys
from pathlib import Path

import black_box
import pytest
import torch
from black_box import Subject
from budgets import all_within_budget
from other_blocks import DEPTH, KINDS, hugging_face, images, maps, timm
from peft_models import block_calls
from torch import nn
from torch.distributed.fsdp import fully_shard

import samfast

EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
# A cast of a module of sam3's loses the imaginary part of its positions.
CAST = pytest.mark.parametrize(
    "kind",
    [k for k in KINDS.values() if k.package != "sam3"],
    ids=[n for n in KINDS if n != "meta"],
)
_HUGGING_FACE = ("eager", "sdpa", "sam-hq", "sam3", "sam3-eager")
# transformers 5.23 has no checkpoints in SAM 3's encoder.
CHECKPOINTED = pytest.mark.parametrize(
    "kind", [KINDS[name] for name in _HUGGING_FACE[:3]], ids=_HUGGING_FACE[:3]
)
HUGGING_FACE = pytest.mark.parametrize(
    "kind", [KINDS[name] for name in _HUGGING_FACE], ids=_HUGGING_FACE
)


def run(kind, model, x):
    """The map, and the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    y = kind.map_of(model, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(y, [x, *named.values()], dy, materialize_grads=True)
    return {"y": y.detach(), "dx": grads[0], **dict(zip(named, grads[1:], strict=True))}


def as_exact_as(kind, fused, stock, x):
    double = copy.deepcopy(stock).double()
    all_within_budget(
        run(kind, fused, x),
        lambda: run(kind, stock, x),
        lambda: run(kind, double, x.double()),
        torch.float32,
    )


@pytest.mark.slow_on_cpu("hq", "eager")
@EVERY
def test_every_block_is_one_operator(kind):
    stock = kind.encoder()
    fused, x = copy.deepcopy(stock), images()
    before = [*fused.modules()]
    assert samfast.fuse(fused) is fused and samfast.fuse(fused) is fused
    assert all(a is b for a, b in zip(before, fused.modules(), strict=True))
    assert block_calls(fused, x) == DEPTH
    assert [*fused.state_dict()] == [*stock.state_dict()]
    as_exact_as(kind, fused, stock, x)
    found = samfast.report(fused)
    assert {*found.blocks.values()} == {*found.attention.values()} == {"fused"}
    assert len(found.blocks) == len(found.attention) == DEPTH
    for layer, own in zip(kind.of(fused), kind.of(stock), strict=True):
        assert isinstance(layer, type(own)) and type(layer).__module__.startswith(kind.package)
    samfast.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    assert all(torch.equal(v, run(kind, fused, x)[n]) for n, v in run(kind, stock, x).items())


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("position", [0, 1], ids=["windows", "map"])
@CAST
def test_black_box(kind, position, check):
    stock = kind.of(kind.encoder())[position].double()
    if check is black_box.infinities and hasattr(
        stock, "attn"
    ):  # a row that padding alone reads stays finite in ours
        stock.attn.rel_pos_h.requires_grad_(False), stock.attn.rel_pos_w.requires_grad_(False)
    if check is black_box.second_derivative and kind is KINDS["sam3"]:
        pytest.skip("torch's flash attention has no second derivative, so the stock block has none")
    ours = samfast.fuse(copy.deepcopy(stock))
    assert ours.block_problem() is None
    check(Subject(ours, stock, maps(3, grid=kind.grid)))


@pytest.mark.slow_on_cpu("hq", "eager", "sam-hq")
@EVERY
def test_modes_of_memory(kind):
    model, x = samfast.fuse(kind.encoder(), memory="fast"), images()
    fast = run(kind, model, x)
    for memory in ("balanced", "minimal"):
        samfast.fuse(model, memory=memory)
        assert samfast.report(model).memory == (memory,)
        for name, value in run(kind, model, x).items():
            assert torch.equal(value, fast[name]), (memory, name)


@EVERY
def test_adapters_in_their_blocks(kind):
    pytest.importorskip("peft")
    import peft

    config = peft.LoraConfig(r=2, target_modules=[*kind.linears])
    theirs = samfast.fuse(peft.get_peft_model(kind.encoder(), config))
    assert block_calls(theirs, images()) == DEPTH
    target = kind.linears[0]
    ours = samfast.fuse(samfast.attach(kind.encoder(), samfast.Lora(target=target), train=()))
    assert block_calls(ours, images()) == DEPTH


@HUGGING_FACE
def test_what_transformers_records(kind):
    """Hidden states come from fused blocks, attentions from its own forward."""
    stock = kind.encoder()
    fused, x = samfast.fuse(copy.deepcopy(stock)), images()
    ours, theirs = (model(x, output_hidden_states=True).hidden_states for model in (fused, stock))
    assert len(ours) == len(theirs) == DEPTH + 1
    double = copy.deepcopy(stock).double()
    exact = double(x.double(), output_hidden_states=True).hidden_states
    all_within_budget(ours, theirs, exact, torch.float32, [*"abc"])
    assert block_calls(fused, x, output_hidden_states=True) == DEPTH
    assert block_calls(fused, x) == DEPTH
    assert block_calls(fused, x, output_attentions=True) == 0
    ours, theirs = (model(x, output_attentions=True).attentions for model in (fused, stock))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert block_calls(fused, x) == DEPTH


@CHECKPOINTED
def test_the_checkpoints_of_transformers(kind):
    model, x = samfast.fuse(kind.encoder()).train(), images()
    expected = run(kind, model, x)
    model.gradient_checkpointing_enable()
    for name, value in run(kind, model, x).items():
        assert torch.equal(value, expected[name]), name


def test_another_attention_of_transformers():
    model = samfast.fuse(KINDS["eager"].encoder())
    model.set_attn_implementation("sdpa")
    assert block_calls(model, images()) == DEPTH


@pytest.mark.parametrize("kind", [KINDS["sdpa"], KINDS["timm"]], ids=["sdpa", "timm"])
def test_sharded_after_fuse(kind, tmp_path):
    stock, x = kind.encoder(), images()
    fused = samfast.fuse(copy.deepcopy(stock))
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for block in kind.of(fused):
            fully_shard(block, mesh=mesh)
        assert {*samfast.report(fused).blocks.values()} == {"fused"}
        assert block_calls(fused, x) == DEPTH
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow_on_cpu
@EVERY
def test_a_pickled_model_opens_where_only_samfast_is_imported(kind, tmp_path):
    if kind.package == "medical_sam":
        pytest.skip("the copy is made in this process, so no other one can import it")
    if kind.package == "sam3":
        pytest.skip("to import sam3 whole takes a dozen packages that its blocks do not need")
    model, x = samfast.fuse(kind.encoder()).eval(), images()
    with torch.no_grad():
        y = kind.map_of(model, x)
    torch.save({"model": model, "x": x, "y": y}, tmp_path / "model.pt")
    code = f"""if True:
        import sys, torch, samfast
        from samfast.integrations.torchvision import declare_missing_schemas
        declare_missing_schemas()
        torch.set_num_threads({torch.get_num_threads()})
        held = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        with torch.no_grad():
            y = held["model"](held["x"])
        y = getattr(y, "last_hidden_state", y)
        print(torch.equal(y if isinstance(y, torch.Tensor) else y[0], held["y"]))
        print(set(samfast.report(held["model"]).blocks.values()))
        samfast.unfuse(held["model"])
        names = ("segment_anything", "transformers", "timm", "peft", "segment_anything_hq")
        print(*[name for name in names if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    known = {"segment_anything_hq": "timm segment_anything_hq"}.get(kind.package, kind.package)
    assert done.stdout.splitlines() == ["True", "{'fused'}", known]


@pytest.mark.slow_on_cpu
@CAST
def test_ten_steps_of_training(kind):
    def train(model, dtype):
        model = copy.deepcopy(model).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        x = images().to(dtype)
        for _ in range(10):
            y = kind.map_of(model, x)
            loss = (y - y.detach().flip(0)).pow(2).mean() + y.pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {"loss": loss.detach(), **{n: p.detach() for n, p in model.named_parameters()}}

    stock = kind.encoder()
    ours = train(samfast.fuse(copy.deepcopy(stock)), torch.float32)
    all_within_budget(
        ours,
        lambda: train(stock, torch.float32),
        lambda: train(stock, torch.float64),
        torch.float32,
    )


# What is left alone, bit for bit, and the reason.


def layer(kind):
    """The first block of a new encoder, float32."""
    return kind.of(kind.encoder())[0]


def test_an_extra_child():
    block = layer(KINDS["sdpa"])
    block.adapter = nn.Linear(32, 32)
    with pytest.warns(UserWarning, match="it has a child adapter, which would be left out"):
        samfast.fuse(block)
    assert samfast.report(block).blocks[""] == (
        "not fused: it has a child adapter, which would be left out"
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [KINDS["eager"], KINDS["timm"]], ids=["eager", "timm"])
def test_a_class_that_is_patched(kind, when, monkeypatch):
    """Of the block, and of what its attention calls."""
    stock = layer(kind)
    fused = copy.deepcopy(stock)
    name = "get_decomposed_rel_pos" if hasattr(stock.attn, "get_decomposed_rel_pos") else "forward"
    own = getattr(type(stock.attn), name)
    if when == "after":
        samfast.fuse(fused)
    monkeypatch.setattr(type(stock.attn), name, lambda self, *x, **y: own(self, *x, **y) * 1.05)
    if when == "before":
        with pytest.warns(UserWarning, match=f"the {name} of .*Attention was replaced"):
            samfast.fuse(fused)
    x = maps(dtype=torch.float32)
    assert torch.equal(fused(x), stock(x))
    assert "was replaced" in samfast.report(fused).blocks[""]


def test_a_derived_class():
    block = layer(KINDS["eager"])
    block.__class__ = type("Doubled", (type(block),), {"forward": lambda self, x: 2 * x})
    with pytest.raises(ValueError, match="Doubled, a class derived from transformers' SamVision"):
        samfast.fuse(nn.Sequential(block))


def test_another_activation():
    block = layer(KINDS["sdpa"])
    block.mlp.act = nn.SiLU()
    samfast.fuse(block)
    assert samfast.report(block).blocks[""].startswith("not fused: the activation is SiLU()")
    torch.testing.assert_close(block(maps(dtype=torch.float32)), block(maps(dtype=torch.float32)))


def test_dropout_of_the_attention_acts_in_training():
    block = hugging_face("Sam", "eager", attention_dropout=0.5).vision_encoder.layers[0]
    stock, x = copy.deepcopy(block), maps(dtype=torch.float32)
    samfast.fuse(block)
    assert block_calls(block.eval(), x) == 1
    assert block_calls(block.train(), x) == 0
    assert samfast.report(block).blocks[""] == (
        "not fused: attn.dropout is 0.5, which acts in training"
    )
    torch.manual_seed(1)
    expected = stock.train()(x)
    torch.manual_seed(1)
    assert torch.equal(block(x), expected)


TIMM = {
    "layer scale": ({"init_values": 0.1}, "ls1 is timm's LayerScale, which a fused block leaves"),
    "drop path": ({"drop_path_rate": 0.5}, "drop_path1 is timm's DropPath, which a fused block"),
    "norms of q and k": ({"qk_norm": True}, "attn.q_norm is torch's LayerNorm, which a fused"),
    "dropout": ({"proj_drop_rate": 0.5}, "attn.proj_drop is a dropout of 0.5, which acts in tra"),
    "dropout of the attention": ({"attn_drop_rate": 0.5}, "attn.attn_drop is a dropout of 0.5, w"),
}


@pytest.mark.parametrize("name", TIMM)
def test_options_of_timm(name):
    options, reason = TIMM[name]
    model = timm(**options)
    block = model.blocks[1].train()
    stock, x = copy.deepcopy(block), maps(dtype=torch.float32)
    samfast.fuse(block)
    assert samfast.report(block).blocks[""].startswith(f"not fused: {reason}")
    torch.manual_seed(1)
    expected = stock(x)
    torch.manual_seed(1)
    assert torch.equal(block(x), expected)


def test_rotary_positions_of_timm():
    pytest.importorskip("timm")
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    model = VisionTransformerSAM(
        img_size=80, num_classes=0, embed_dim=32, depth=1, num_heads=2, use_rope=True, neck_chans=8
    )
    with pytest.warns(UserWarning, match="its attn has a child rope, which would be left out"):
        samfast.fuse(model.blocks[0])


def test_unknown_blocks_are_named():
    transformers = pytest.importorskip("transformers")
    config = transformers.Sam2HieraDetConfig(
        hidden_size=16, num_attention_heads=1, blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 1, 1, 1],
    )  # fmt: skip
    model = transformers.Sam2HieraDetModel(config)
    with pytest.raises(ValueError, match="Sam2MultiScaleBlock, which fuse does not know"):
        samfast.fuse(model)


@CHECKPOINTED
def test_attentions_recorded_in_a_checkpoint(kind):
    """What a checkpoint runs again is what it ran, although nothing is recorded then."""
    stock = kind.encoder().train()
    fused = samfast.fuse(copy.deepcopy(stock))
    grads = []
    for model in (stock, fused):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        x = images().requires_grad_()
        y = model(x, output_attentions=True).last_hidden_state
        grads.append(torch.autograd.grad(y.square().mean(), x)[0])
    assert torch.equal(*grads)
    assert block_calls(fused, images()) == DEPTH


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["get_decomposed_rel_pos", "window_partition"])
def test_a_method_of_one_instance(name, when):
    stock = layer(KINDS["eager"])
    holder = stock if name == "window_partition" else stock.attn
    own = getattr(type(holder), name)

    def changed(*arguments):
        y = own(holder, *arguments)
        return (1.1 * y[0], y[1]) if isinstance(y, tuple) else 1.1 * y

    fused = copy.deepcopy(stock)
    if when == "after":
        samfast.fuse(fused)
    for block in (stock, fused):
        setattr(block if holder is stock else block.attn, name, changed)
    if when == "before":
        with pytest.warns(UserWarning, match=f"{name} was replaced"):
            samfast.fuse(fused)
    x = maps(dtype=torch.float32)
    assert torch.equal(fused(x), stock(x))
    assert samfast.report(fused).blocks[""].endswith(f"{name} was replaced")


def test_an_activation_whose_call_is_patched(monkeypatch):
    block = samfast.fuse(layer(KINDS["sdpa"]))
    kind = type(block.mlp.act)
    monkeypatch.setattr(kind, "__call__", lambda self, x: 0.5 * self.forward(x), raising=False)
    assert samfast.report(block).blocks[""].startswith("not fused: the activation is a changed")


class Halved(torch.Tensor):
    """A weight that means something else to torch's functions."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [t.as_subclass(torch.Tensor) * 0.5 if type(t) is cls else t for t in args]
        return func(*plain, **(kwargs or {}))


@pytest.mark.parametrize("kind", [KINDS["copy"], KINDS["sdpa"]], ids=["copy", "sdpa"])
def test_a_weight_of_another_class(kind):
    block = samfast.fuse(layer(kind).requires_grad_(False))
    with torch.no_grad():
        weight = block.mlp.lin1.weight.detach().as_subclass(Halved)
    del block.mlp.lin1.weight
    block.mlp.lin1.weight = weight
    assert block.block_problem() == "lin1 has a weight that is a Halved"


def test_windows_that_are_none():
    block = samfast.fuse(layer(KINDS["sdpa"]))
    block.window_size = -1
    assert block_calls(block, maps(dtype=torch.float32)) == 0
