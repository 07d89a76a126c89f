# SPDX-License-Identifier: Apache-2.0
"""What is not segment_anything's, but looks like it, is left alone bit for bit, and says why."""

import copy
import functools
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import segment_anything
import torch
from budgets import within_budget
from sam_layers import attention, block
from segment_anything.modeling import image_encoder
from segment_anything.modeling.image_encoder import Attention, Block, MLPBlock
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import samfast
from samfast.modules import RelPosAttention, SamBlock, proof

STOCK = {kind: kind.forward for kind in (Block, Attention, MLPBlock)}
KINDS = pytest.mark.parametrize("kind", STOCK)


def model():
    """A padded window and a map."""
    return nn.Sequential(block(4), block(0, (6, 7))).float()


def run(model):
    """Result and gradients, in train and in eval mode, from one random state."""
    found = {}
    for training in (True, False):
        x = torch.randn(2, 6, 7, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(3)
        y = model.train(training)(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)
        found |= {(training, i): t for i, t in enumerate((y.detach(), *grads)) if t is not None}
    return found


def left_alone(fused, stock, reason, modules=(0, 1)):
    """The same bits, and the reason in the report of these blocks."""
    ours, theirs = run(fused), run(stock)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    blocks = samfast.report(fused).blocks
    for i in modules:
        assert re.fullmatch(f"not fused: {reason}", blocks[str(i)]), blocks
        assert samfast.report(fused).attention[f"{i}.attn"].startswith("not fused: ")


def patched(kind, change):
    """``change(self, x, stock)`` in place of the forward of a class."""
    stock = STOCK[kind]

    def forward(self, x):
        return change(self, x, functools.partial(stock, self))

    return forward


CHANGES = {
    "a factor": (lambda m, x, stock: 1.01 * stock(x), "another output"),
    "dropout": (lambda m, x, stock: F.dropout(stock(x), 0.01, m.training), "output.* train mode"),
    "training only": (lambda m, x, stock: stock(x) + m.training, "output.* train mode"),
    "eval only": (lambda m, x, stock: stock(x) + (not m.training), "output.* eval mode"),
    "detach": (lambda m, x, stock: stock(x.detach()), "another gradient of x"),
    "in place": (lambda m, x, stock: stock(x).add_(1e-3), "another output"),
    "narrow": (lambda m, x, stock: stock(x).bfloat16().float(), "another"),
    "a hidden tensor": (lambda m, x, stock: stock(x) + 0 * HIDDEN, "trains a tensor that is not"),
    "counts": (lambda m, x, stock: count(m, stock(x)), "changes an attribute"),
}  # fmt: skip
HIDDEN = nn.Parameter(torch.ones(()))


def count(module, y):
    module.calls = getattr(module, "calls", 0) + 1
    return y


@pytest.mark.parametrize("when", ["before", "after"])
@KINDS
def test_a_class_that_is_patched(kind, when, monkeypatch):
    change = patched(kind, CHANGES["a factor"][0])
    stock, fused = model(), model()
    if when == "before":
        monkeypatch.setattr(kind, "forward", change)
        with pytest.warns(UserWarning, match=r"leaves 4 of 4 modules .*; 0(\.attn)?: its forw"):
            samfast.fuse(fused)
        assert not any(isinstance(m, (SamBlock, RelPosAttention)) for m in fused.modules())
    else:
        assert set(samfast.report(samfast.fuse(fused)).blocks.values()) == {"fused"}
        monkeypatch.setattr(kind, "forward", change)
    left_alone(fused, stock, r"its forward gives another output \(.* % off\) in train mode")
    monkeypatch.undo()
    assert set(samfast.report(samfast.fuse(fused)).blocks.values()) == {"fused"}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_forward_may_do(name, monkeypatch):
    change, reason = CHANGES[name]
    fused, stock = samfast.fuse(model()), model()
    monkeypatch.setattr(Block, "forward", patched(Block, change))
    left_alone(fused, stock, f".*{reason}.*")


def test_a_forward_that_gives_something_else(monkeypatch):
    monkeypatch.setattr(Block, "forward", patched(Block, lambda m, x, stock: (stock(x), 0.0)))
    assert proof.objection(block(4)) == "its forward gives tuple in train mode"
    monkeypatch.setattr(Block, "forward", patched(Block, lambda m, x, stock: stock(x).detach()))
    assert "another gradient of x (1e+02 % off)" in proof.objection(block(4))
    monkeypatch.setattr(Block, "forward", patched(Block, lambda m, x, stock: stock(x)[:1]))
    assert "gives a tensor of shape (1, 5, 3, 32)" in proof.objection(block(4))
    monkeypatch.setattr(Block, "forward", patched(Block, lambda m, x, stock: m.missing(x)))
    assert "fails alone: AttributeError" in proof.objection(block(4))


@KINDS
@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (nn.Linear(32, 32), "a child extra"),
        (nn.Parameter(torch.ones(32)), "a parameter extra"),
        (torch.ones(32), "a buffer extra"),
    ],
    ids=["child", "parameter", "buffer"],
)
def test_an_extra_part(kind, part, reason):
    """Only the block that has it is left alone."""
    stock, fused = model(), model()
    for m in (stock, fused):
        holder = next(h for h in m[0].modules() if type(h) is kind)
        adding = holder.register_buffer if type(part) is torch.Tensor else holder.__setattr__
        adding("extra", part)
    with pytest.warns(UserWarning, match=f"fuse leaves 2 of 4 modules .*{reason}"):
        samfast.fuse(fused)
    left_alone(nn.Sequential(fused[0]), nn.Sequential(stock[0]), f"it.* has {reason}.*", (0,))
    assert type(fused[1]) is SamBlock
    # Given later, to a fused block.
    later = samfast.fuse(model())
    adding = later[0].register_buffer if type(part) is torch.Tensor else later[0].__setattr__
    adding("extra", part)
    assert samfast.report(later).blocks["0"].startswith(f"not fused: it has {reason}")


def test_a_missing_part():
    layer = block(4)
    layer.attn.rel_pos_h = None
    with pytest.warns(UserWarning, match="its attn has no rel_pos_h"):
        samfast.fuse(nn.Sequential(layer))


@KINDS
def test_another_signature(kind, monkeypatch):
    stock, fused = model(), samfast.fuse(model())

    def forward(self, x, task_idx=None):
        return STOCK[kind](self, x)

    monkeypatch.setattr(kind, "forward", forward)
    left_alone(
        fused, stock, rf"the forward of {kind.__name__} takes \(self, x, task_idx=None\), not .*"
    )
    monkeypatch.setattr(kind, "forward", functools.partialmethod(forward, task_idx=1))
    assert "takes " in proof.objection(fused[0])


def test_a_harmless_patch_stays_fused(monkeypatch):
    """As a copy with other line breaks and names would."""
    fused = samfast.fuse(model())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = STOCK[Block](self, x)
        return result

    monkeypatch.setattr(Block, "forward", forward)
    assert set(samfast.report(fused).blocks.values()) == {"fused"}


GLOBAL = False


def test_a_flag_that_is_turned_later(monkeypatch):
    """On one module, on the class, among the globals, in a list: each is asked anew."""

    def forward(self, x):
        on = getattr(self, "tripled", False) or self.on_the_class or GLOBAL
        return STOCK[Block](self, x) * (1 + on + any(getattr(self, "flags", ())))

    monkeypatch.setattr(Block, "forward", forward)
    monkeypatch.setattr(Block, "on_the_class", False, raising=False)
    fused, stock, reason = samfast.fuse(model()), model(), "its forward gives another output.*"
    for m in (fused, stock):
        m[1].tripled = True
    left_alone(nn.Sequential(fused[1]), nn.Sequential(stock[1]), reason, (0,))
    assert samfast.report(fused).blocks["0"] == "fused"
    fused[1].tripled = False
    assert samfast.report(fused).blocks["1"] == "fused"
    fused[0].flags = [False]
    assert samfast.report(fused).blocks["0"] == "fused"
    fused[0].flags[0] = True
    assert samfast.report(fused).blocks["0"].startswith("not fused")
    monkeypatch.setattr(Block, "on_the_class", True)
    assert samfast.report(fused).blocks["1"].startswith("not fused")
    monkeypatch.setattr(Block, "on_the_class", False)
    assert samfast.report(fused).blocks["1"] == "fused"
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", True)
    assert samfast.report(fused).blocks["1"].startswith("not fused")


def test_an_object_that_may_change_unseen(monkeypatch):
    """Where the forward reads it; otherwise it does not matter."""
    fused = samfast.fuse(model())
    fused[0].config = object()
    assert samfast.report(fused).blocks["0"] == "fused"

    def forward(self, x):
        return STOCK[Block](self, x) if self.config else x

    monkeypatch.setattr(Block, "forward", forward)
    assert samfast.report(fused).blocks["0"] == (
        "not fused: the forward of Block reads its attribute config, a object whose changes are "
        "not seen"
    )


def test_an_attribute_that_changes_from_call_to_call():
    fused = samfast.fuse(model())
    for step in range(proof.MOST_PROBES + 2):
        fused[0].step = step
        state = samfast.report(fused).blocks["0"]
    assert state == "not fused: its attributes change from call to call: step"
    assert samfast.report(fused).blocks["1"] == "fused"
    proof._probes.clear()


@pytest.mark.parametrize("name", ["window_partition", "add_decomposed_rel_pos", "get_rel_pos"])
def test_a_helper_that_is_patched(name, monkeypatch):
    fused, stock = samfast.fuse(nn.Sequential(block(4)).float()), nn.Sequential(block(4)).float()
    helper = getattr(image_encoder, name)

    def other(*args):
        made = helper(*args)
        return (made[0] * 1.01, made[1]) if isinstance(made, tuple) else made * 1.01

    monkeypatch.setattr(image_encoder, name, other)
    left_alone(fused, stock, "its forward gives another output.*", (0,))


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.GELU])
def test_a_class_of_torch_that_is_patched(kind, monkeypatch):
    fused, stock, own = samfast.fuse(model()), model(), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * 1.01)
    left_alone(fused, stock, ".*another output.*")


def test_nothing_of_the_users_changes():
    """Neither modules nor random numbers; and no GPU is touched."""
    fused, before = model(), copy.deepcopy(model().state_dict())
    fused.train()
    fused[0].register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: pytest.fail("a global one"))
    proof._verdicts.clear()
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.device("meta"):
        samfast.fuse(fused)
        assert torch.is_autocast_enabled("cpu") and torch.get_default_device().type == "meta"
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in fused.parameters())
    assert all(m.training for m in fused.modules())
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("mode", ["inference", "no_grad", "bfloat16", "narrow default", "meta"])
def test_asked_in_the_first_forward(mode):
    """Whatever is on at that moment."""
    layer, x = SamBlock.from_block(block(4).float()), torch.randn(1, 6, 7, 32)
    proof._verdicts.clear()
    if mode in ("bfloat16", "meta"):
        layer, x = (t.to(torch.bfloat16 if mode == "bfloat16" else "meta") for t in (layer, x))
    context = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
    torch.set_default_dtype(torch.bfloat16 if mode == "narrow default" else torch.float32)
    try:
        with context.get(mode, torch.enable_grad)():
            layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(proof._verdicts.values()) == {None}


@pytest.fixture
def mesh(tmp_path):
    """Of one process."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_after_fuse(mesh):
    """fully_shard makes a class of its own of each block's; they are fused still."""
    stock, fused = model(), samfast.fuse(model())
    for layer in fused:
        fully_shard(layer, mesh=mesh)
    assert type(fused[0]) is not SamBlock
    report = samfast.report(fused)
    assert set(report.blocks.values()) == set(report.attention.values()) == {"fused"}
    x = torch.randn(2, 6, 7, 32)
    within_budget(fused(x), stock(x), copy.deepcopy(stock).double()(x.double()), torch.float32)
    samfast.fuse(fused, memory="minimal")
    assert fused[0].memory == "minimal" and fused[0].block_problem() is None
    with pytest.raises(RuntimeError, match="0 was given the class FSDPSamBlock after fuse; unfuse"):
        samfast.unfuse(fused)


def test_sharded_before_fuse(mesh):
    """Only the attention is fused, and its sharded parameters are left alone."""
    model_ = model()
    for layer in model_:
        fully_shard(layer, mesh=mesh)
    proof._verdicts.clear()
    samfast.fuse(model_)
    assert type(model_[0].attn) is RelPosAttention
    assert set(samfast.report(model_).blocks.values()) == {
        "not fused: a FSDPBlock, which a wrapper made of segment_anything's Block; fuse first"
    }


class Shouting(SamBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_class_derived_from_ours_is_not_ours():
    fused = samfast.fuse(model())
    fused[0].__class__ = Shouting
    assert samfast.report(fused).blocks["0"].startswith("not fused: a Shouting, a class derived")


def test_a_compiled_block_asks_while_it_is_traced():
    fused = samfast.fuse(model())
    fused[0].extra = nn.Linear(1, 1)
    torch._dynamo.reset()
    compiled, x = torch.compile(fused, fullgraph=True, backend="eager"), torch.randn(1, 6, 7, 32)
    with torch.no_grad():
        assert torch.equal(compiled(x), fused(x))
        assert torch.equal(fused[0](x), model()[0](x))


COPY = textwrap.dedent(
    """
    import sys, warnings
    sys.path.insert(0, sys.argv[1])
    import torch
    from samfast.integrations.torchvision import declare_missing_schemas
    declare_missing_schemas()
    assert "samfast.modules.proof" not in sys.modules
    from segment_anything.modeling import image_encoder
    assert sys.argv[1] in image_encoder.__file__
    {patch}
    import samfast
    torch.manual_seed(0)
    blocks = [image_encoder.Block(32, 2, use_rel_pos=True, window_size=w, input_size=(8, 8))
              for w in (4, 0)]
    model = torch.nn.Sequential(*blocks)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(1, 8, 8, 32)
    stock = model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samfast.fuse(model)
    print([str(w.message) for w in caught if "fuse leaves" in str(w.message)])
    assert torch.equal(model(x), stock)
    print(samfast.report(model))
    """
)


def in_a_process(folder, patch=""):
    command = [sys.executable, "-c", COPY.format(patch=patch), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_changed_copy_of_segment_anything(tmp_path):
    """Found before the installed one, as in a research repository."""
    package = tmp_path / "segment_anything"
    for path in Path(segment_anything.__file__).parent.rglob("*.py"):
        target = package / path.relative_to(Path(segment_anything.__file__).parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        if path.name == "image_encoder.py":
            text, n = re.subn(r"x = x \+ self\.mlp\(", "x = x + 1.5 * self.mlp(", text)
            assert n == 1
        target.write_text(text)
    said = in_a_process(tmp_path)
    assert "fuse leaves 4 of 4 modules" in said and "2 x not fused: its forward gives ano" in said


@pytest.mark.slow
@KINDS
def test_a_class_that_is_patched_before_samfast_is_imported(kind):
    patch = (
        f"own = image_encoder.{kind.__name__}.forward; "
        f"image_encoder.{kind.__name__}.forward = lambda self, x: own(self, x) * 1.05"
    )
    said = in_a_process(Path(segment_anything.__file__).parents[1], patch)
    assert "fuse leaves 4 of 4 modules" in said and "2 x not fused: its forward gives ano" in said


def test_one_warning_and_none_where_all_is_fused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samfast.fuse(model())
        samfast.fuse(attention((4, 4)))
