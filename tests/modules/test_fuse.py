# SPDX-License-Identifier: Apache-2.0
"""fuse and unfuse on whole models: what is kept, both orders with attach, refusals, report."""

import copy
import functools
import io
import pickle
import types

import pytest
import torch
from budgets import within_budget
from sam_layers import attention, block, random_tables
from segment_anything.modeling.image_encoder import Attention, Block
from stock_runs import by_reference
from torch import nn
from torch.utils.checkpoint import checkpoint

import samfast
from samfast.models import encode, segment
from samfast.modules import RelPosAttention, SamBlock

IMAGES = torch.rand(2, 3, 60, 50, generator=torch.Generator().manual_seed(0)) * 255
METHODS = {
    "lora": samfast.Lora(rank=2),
    "slices": samfast.Lora(rank=2, slices=("q", "v")),
    "everywhere": samfast.Lora(rank=2, target=("qkv", "proj", "lin1", "lin2")),
    "conv-lora": samfast.ConvLora(rank=2, experts=3),
}


@pytest.fixture
def sam(tiny_sam):
    """A vit_tiny whose attention matters: windows of 7 on maps of 4 x 4 are padded."""

    def build():
        model, generator = random_tables(tiny_sam()), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for layer in model.image_encoder.blocks:
                layer.attn.qkv.weight *= 3
                nn.init.normal_(layer.attn.qkv.bias, std=0.5, generator=generator)
        return model

    return build


def kinds(model):
    return {type(m) for m in model.modules() if isinstance(m, (Attention, Block))}


def same_function(fused, stock, images=IMAGES):
    """Embeddings within the budget of the stock model's own float32.

    A fused block gives its map token by token, where a stock one keeps the layout of the patch
    embedding, channel by channel. The convolutions of the neck round differently on the two, so
    the stock model is given the first one as well.
    """
    stock = copy.deepcopy(stock)
    stock.image_encoder.blocks[0].register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))
    exact = by_reference(encode, copy.deepcopy(stock).double(), images.double())
    with torch.no_grad():
        ours = encode(fused, images)
        within_budget(ours, by_reference(encode, stock, images), exact, torch.float32)


def test_the_model_computes_the_same(sam):
    stock = sam()
    fused = copy.deepcopy(stock)
    assert samfast.fuse(fused) is fused
    assert kinds(fused) == {RelPosAttention, SamBlock}
    same_function(fused, stock)


def test_everything_is_kept(sam):
    model = samfast.attach(sam(), samfast.Lora(rank=2)).train()
    called = []
    model.image_encoder.blocks[1].register_forward_hook(lambda *_: called.append("block"))
    model.image_encoder.blocks[2].attn.register_forward_pre_hook(lambda *_: called.append("attn"))

    def state():
        return {
            "modules": {name: id(module) for name, module in model.named_modules()},
            "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters()},
            "keys": list(model.state_dict()),
            "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
            "training": {name: module.training for name, module in model.named_modules()},
        }

    before, values = state(), copy.deepcopy(model.state_dict())
    for memory in ("fast", "minimal"):
        assert samfast.fuse(model, memory) is model
        assert kinds(model) == {RelPosAttention, SamBlock}
        now = state()
        for layer in model.image_encoder.blocks:
            assert layer.memory == memory and f"memory={memory}" in str(layer)
        for i in range(6):
            now["attributes"][f"image_encoder.blocks.{i}"].remove("memory")
        assert now == before
    segment(model, IMAGES)
    assert called == ["block", "attn"]
    assert samfast.unfuse(model) is model
    assert kinds(model) == {Attention, Block}
    assert state() == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_unfuse_gives_the_bits_of_the_stock_model(sam):
    model = sam()
    expected = encode(model, IMAGES)
    samfast.fuse(model)
    model.image_encoder.blocks[0].attn.backend = "torch"
    encode(model, IMAGES)
    assert torch.equal(encode(samfast.unfuse(model), IMAGES), expected)
    assert "backend" not in vars(model.image_encoder.blocks[0].attn)


@pytest.mark.slow_on_cpu("everywhere")
@pytest.mark.slow_on_cpu(but=["conv-lora", "everywhere"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_attach_before_and_after(sam, move, method, tmp_path):
    """Both orders, adapter files, and aux_loss; the files are those of the stock model."""
    stock = move(samfast.attach(sam(), method, train=()))
    after = samfast.attach(samfast.fuse(sam()), method, train=())
    before = samfast.fuse(samfast.attach(sam(), method, train=()))
    folder = samfast.save_adapter(stock, tmp_path / "stock")
    loaded = samfast.load_adapter(samfast.fuse(sam()), folder)
    for model in (after, before):
        samfast.load_adapter(model, folder, trainable=True)
    with torch.no_grad():
        expected = encode(before, IMAGES)
        assert torch.equal(encode(after, IMAGES), expected)
        assert torch.equal(encode(loaded, IMAGES), expected)
    if isinstance(method, samfast.Lora):  # rounding may move Conv-LoRA's gate
        same_function(before, stock)
    assert torch.isfinite(samfast.aux_loss(before))
    for model, name in ((after, "after"), (before, "before")):
        mine = samfast.save_adapter(model, tmp_path / name)
        for path in folder.iterdir():
            assert (mine / path.name).read_bytes() == path.read_bytes(), path.name


def test_merged(sam, move):
    model = move(samfast.attach(samfast.fuse(sam()), samfast.Lora(rank=2), train=()))
    stock = samfast.unfuse(copy.deepcopy(model))
    same_function(samfast.merge(model), samfast.merge(stock))
    samfast.unmerge(model)
    expected = encode(model, IMAGES)
    assert torch.equal(encode(samfast.unmerge(samfast.merge(model)), IMAGES), expected)


def test_copies_pickles_and_state_dicts(sam):
    model = samfast.fuse(samfast.attach(sam(), samfast.Lora(rank=2)))
    expected = encode(model, IMAGES)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    stock = samfast.attach(sam(), samfast.Lora(rank=2))
    stock.load_state_dict(torch.load(file, weights_only=True))
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), samfast.fuse(stock))
    for twin in twins:
        assert kinds(twin) == {RelPosAttention, SamBlock}
        assert torch.equal(encode(twin, IMAGES), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(sam, move, reentrant):
    grads = []
    start = move(samfast.fuse(samfast.attach(sam(), samfast.Lora(rank=2), train=())))
    for wrap in (False, True):
        model = copy.deepcopy(start)
        for i, layer in enumerate(model.image_encoder.blocks if wrap else ()):
            model.image_encoder.blocks[i] = Checkpointed(layer, reentrant)
        assert samfast.report(model).attention
        embedded = model.image_encoder(torch.ones(2, 3, 64, 64, requires_grad=True))
        embedded.square().sum().backward()
        grads.append([p.grad for _, p in samfast.trainable_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Checkpointed(nn.Module):
    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def test_parts_of_a_model(sam):
    """The encoder alone, a container, a single layer, and a wrapped model."""
    encoder = samfast.fuse(sam().image_encoder)
    assert kinds(encoder) == {RelPosAttention, SamBlock}
    assert type(samfast.fuse(attention((4, 4)))) is RelPosAttention
    layers = samfast.fuse(nn.ModuleList([block(4), nn.Linear(2, 2)]))
    assert type(layers[0]) is SamBlock and type(layers[1]) is nn.Linear
    assert kinds(samfast.fuse(nn.DataParallel(sam()))) == {RelPosAttention, SamBlock}


class Flipped(Attention):
    def forward(self, x):
        return super().forward(x.flip(1))


class Doubled(Block):
    def forward(self, x):
        return 2 * super().forward(x)


def negated(attention, x):
    return -Attention.forward(attention, x)


def with_own_classes(model):
    """Block 0 has an attention of the user's class, block 1 is of such a class, block 3 patched."""
    blocks = model.image_encoder.blocks
    blocks[0].attn.__class__ = Flipped
    blocks[1].__class__ = Doubled
    blocks[3].attn.forward = types.MethodType(negated, blocks[3].attn)
    return model


def test_classes_of_the_users_own_are_left_alone(sam):
    stock = with_own_classes(sam())
    fused = samfast.fuse(with_own_classes(sam()))
    blocks = fused.image_encoder.blocks
    assert [type(b) for b in blocks] == [SamBlock, Doubled, *[SamBlock] * 4]
    assert [type(b.attn) for b in blocks][:4] == [
        Flipped,
        RelPosAttention,
        RelPosAttention,
        Attention,
    ]
    same_function(fused, stock)
    states = list(samfast.report(fused).attention.values())
    assert states[0] == ("not fused: a Flipped, a class derived from segment_anything's Attention")
    assert states[1] == (
        "fused, windows cut first: its block is a Doubled, a class derived from segment_anything's "
        "Block"
    )
    assert states[3] == "not fused: Attention with a forward that was replaced"
    assert states[2] == states[4] == states[5] == "fused"
    states = list(samfast.report(fused).blocks.values())
    assert states[0] == "fused in parts: attn is test_fuse's Flipped"
    assert states[1] == "not fused: a Doubled, a class derived from segment_anything's Block"
    assert states[2] == "fused"
    assert states[3] == "fused in parts: attn is segment_anything's Attention"
    samfast.unfuse(fused)
    assert torch.equal(encode(fused, IMAGES), encode(stock, IMAGES))


def test_a_block_of_the_users_own_inside_out():
    """Stock attention outside any block is fused as a map."""
    model = nn.Sequential(attention((4, 4)), nn.Identity())
    x = torch.randn(2, 4, 4, 32, dtype=torch.float64)
    expected = by_reference(copy.deepcopy(model), x)
    y = samfast.fuse(model)(x)
    assert samfast.report(model).attention == {"0": "fused"}
    within_budget(y, expected, expected, torch.float64)


@pytest.mark.parametrize("function", [samfast.fuse, samfast.unfuse])
def test_nothing_to_fuse(toy, function):
    with pytest.raises(ValueError, match="no block or attention that fuse knows"):
        function(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is str"):
        function("model")


@pytest.mark.parametrize("function", [samfast.fuse, samfast.unfuse])
def test_blocks_of_another_package_are_left_alone(toy, sam, function):
    vendored = toy()
    sentence = "not fused: toy_sam's Block, which fuse does not know"
    with pytest.raises(ValueError, match=f"; image_encoder.blocks.0 is {sentence}"):
        function(vendored)
    assert set(samfast.report(vendored).blocks.values()) == {sentence}
    mixed = nn.ModuleList([vendored.image_encoder.blocks[0], block(4)])
    blocks = samfast.report(samfast.fuse(mixed)).blocks
    assert blocks == {"0": sentence, "1": "fused"}


@pytest.mark.parametrize("function", ["fuse", "unfuse"])
def test_nothing_but_the_users_own(function):
    layer = attention((4, 4))
    layer.__class__ = Flipped
    model = nn.Sequential(layer)
    with pytest.raises(
        ValueError, match=f"Sequential has nothing to {function}; 0 is not fused: a Flipped"
    ):
        getattr(samfast, function)(model)
    assert type(model[0]) is Flipped


def test_unfuse_what_is_not_fused(sam):
    sentence = r"nothing to unfuse; image_encoder\.blocks\.0\.attn is not fused: still segment_any"
    with pytest.raises(ValueError, match=sentence):
        samfast.unfuse(sam())
    model = samfast.unfuse(samfast.fuse(sam()))
    with pytest.raises(ValueError, match=sentence):
        samfast.unfuse(model)


@pytest.mark.parametrize("memory", ["frugal", "", 1, ["fast"]])
def test_an_unknown_memory_mode(sam, memory):
    model = sam()
    with pytest.raises(ValueError, match=r"memory is .*; it must be one of fast, balanced, minim"):
        samfast.fuse(model, memory)
    assert kinds(model) == {Attention, Block}


def test_memory_of_loose_layers():
    """It belongs to blocks; attention by itself has none, and one block may differ."""
    assert samfast.report(samfast.fuse(nn.Sequential(attention((4, 4))), "minimal")).memory == ()
    model = samfast.fuse(nn.ModuleList([block(4), block(4)]), "balanced")
    model[0].memory = "minimal"
    assert samfast.report(model).memory == ("balanced", "minimal")
    assert samfast.report(samfast.fuse(model)).memory == ("balanced", "minimal")  # none is asked
    assert samfast.report(samfast.fuse(model, "fast")).memory == ("fast",)


def test_report(sam, toy):
    model = sam()
    own = {"not fused: still segment_anything's own"}
    assert set(samfast.report(model).attention.values()) == own
    assert set(samfast.report(model).blocks.values()) == own and samfast.report(model).memory == ()
    assert "attention" in str(samfast.report(model)) and not samfast.report(model).backends
    samfast.fuse(model)
    report = samfast.report(model)
    assert list(report.attention) == [f"image_encoder.blocks.{i}.attn" for i in range(6)]
    assert set(report.attention.values()) == {"fused"}
    assert list(report.blocks) == [f"image_encoder.blocks.{i}" for i in range(6)]
    assert set(report.blocks.values()) == {"fused"} and report.memory == ("fast",)
    assert set(report.backends) == {"relpos_attention", "sam_block"}
    assert [" ".join(line.split()) for line in str(report).splitlines()[2:7]] == [
        "attention 6 x fused",
        "blocks 6 x fused",
        "memory fast",
        f"relpos_attention {report.backends['relpos_attention'][0]}",
        f"sam_block {report.backends['sam_block'][0]}",
    ]
    for i in (1, 2):  # the third is global and has no windows
        model.image_encoder.blocks[i].attn.qkv.register_forward_hook(lambda *_: None)
    report = samfast.report(model)
    parts = "fused in parts: qkv has hooks or a forward of its own"
    assert list(report.blocks.values()) == ["fused", parts, parts, *["fused"] * 3]
    assert f"2 x {parts}" in str(report)
    states = report.attention
    assert states.pop("image_encoder.blocks.1.attn") == (
        "fused, windows cut first: qkv has hooks or a forward of its own"
    )
    assert set(states.values()) == {"fused"}
    assert samfast.report(toy()).attention == {} and "none of SAM's" in str(samfast.report(toy()))


def test_every_trained_tensor_moves_within_three_steps(sam):
    model = samfast.fuse(samfast.attach(sam(), samfast.Lora(rank=2))).train()
    before = {name: p.detach().clone() for name, p in samfast.trainable_parameters(model)}
    optimizer = torch.optim.AdamW(samfast.parameter_groups(model, 1e-3))
    for _ in range(3):
        segment(model, IMAGES).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    used = {n for n in before if n not in samfast.models.unused_by_segment(model)}
    now = dict(model.named_parameters())
    assert [name for name in used if torch.equal(now[name], before[name])] == []


def test_unfuse_refuses_a_forward_that_was_wrapped_since():
    """The wrapper holds the fused forward, which the stock class has not."""
    model = samfast.fuse(nn.Sequential(block(4), block(4)))
    module = model[1].attn
    module.forward = functools.partial(module.forward)
    with pytest.raises(
        RuntimeError, match=r"the forward of 1\.attn, a RelPosAttention, was replaced"
    ):
        samfast.unfuse(model)
    assert type(model[0]) is SamBlock
    del module.forward
    assert type(samfast.unfuse(model)[0]) is Block


class Bare(Block):
    """A block of the user's own, without an attention."""

    def __init__(self):
        nn.Module.__init__(self)

    def forward(self, x):
        return x


def test_shared_attention_and_blocks_without_any():
    model = nn.Sequential(block(4), block(0, (9, 9)), Bare())
    model[1].attn = model[0].attn
    model[0].attn.proj = Doubling(32, 32)
    states = samfast.report(samfast.fuse(model)).attention
    assert list(states) == ["0.attn"]
    assert states["0.attn"].startswith("fused, windows cut first: proj is ")
    assert type(samfast.unfuse(model)[0]) is Block


class Doubling(nn.Linear):
    pass
