# SPDX-License-Identifier: Apache-2.0
"""What is not segment_anything's, but looks like it, is left alone bit for bit, and says why."""

import copy
import functools
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import segment_anything
import torch
from budgets import within_budget
from sam_layers import attention, block
from segment_anything.modeling import image_encoder
from segment_anything.modeling.image_encoder import Attention, Block, MLPBlock
from torch import nn, rand
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.functional import dropout

import samfast
from samfast.fused import proof
from samfast.integrations import probe
from samfast.modules import RelPosAttention, SamBlock

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
        return change(self, x, stock)

    return forward


HIDDEN = nn.Parameter(torch.ones(()))
TABLE = {"scale": 1.0}
ADAPTER = nn.Linear(32, 32).requires_grad_(False)
GLOBAL = 1.0


def count(module, y):
    module.calls = y
    return y


def helped(x):
    return getattr(x, "extra", x)


CHANGES = {
    "a factor": (lambda m, x, stock: 1.01 * stock(m, x), "its forward gives another output.*"),
    "an offset": (lambda m, x, stock: stock(m, x) + 1e-3, "its forward gives another output.*"),
    "in part": (lambda m, x, stock: stock(m, 2.0 * x), "its forward gives another output.*"),
    "dropout": (lambda m, x, stock: F.dropout(stock(m, x), 0.01, m.training), "uses dropout"),
    "training only": (lambda m, x, stock: stock(m, x) + m.training, "uses training"),
    "detach": (lambda m, x, stock: stock(m, x.detach()), "uses detach"),
    "narrow": (lambda m, x, stock: stock(m, x).bfloat16().float(), "uses bfloat16"),
    "grad mode": (lambda m, x, stock: stock(m, x) * torch.is_grad_enabled(), "uses is_grad_en.*"),
    "random": (lambda m, x, stock: stock(m, x) * (torch.rand(()) < 0.9), "uses rand"),
    "a hidden tensor": (lambda m, x, stock: stock(m, x) * HIDDEN, "uses HIDDEN, a Parameter"),
    "a table": (lambda m, x, stock: stock(m, x) * TABLE["scale"], "uses TABLE, a dict"),
    "counts": (lambda m, x, stock: count(m, stock(m, x)), "uses store attr calls"),
    "a flag": (lambda m, x, stock: stock(m, x) * m.gain, "uses gain"),
    "getattr": (lambda m, x, stock: stock(m, helped(x)), "uses getattr"),
    "an adapter": (lambda m, x, stock: stock(m, x) + ADAPTER(x), "uses ADAPTER, a Linear"),
    "torch's rand": (lambda m, x, stock: stock(m, x) * (rand(()) < 0.9), "uses rand"),
    "torch's dropout": (lambda m, x, stock: dropout(stock(m, x), 0.01), "uses dropout"),
    "a module": (lambda m, x, stock: stock(m, x) + sys.flags.debug, "uses sys, a module"),
    "what is not there": (lambda m, x, stock: stock(m, x) * LATER, "uses LATER"),  # noqa: F821
}


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
    monkeypatch.setattr(Block, "gain", 2.0, raising=False)
    monkeypatch.setattr(sys.modules[__name__], "LATER", 2.0, raising=False)
    monkeypatch.delattr(sys.modules[__name__], "LATER")
    monkeypatch.setattr(Block, "forward", patched(Block, change))
    state = samfast.report(fused).blocks["0"]
    assert re.fullmatch(f"not fused: (the forward of Block )?{reason}", state), state
    if name not in ("what is not there", "random", "torch's rand", "torch's dropout"):
        left_alone(fused, stock, ".*")


def test_what_it_reaches_is_watched(monkeypatch):
    """Numbers among the globals and in closures, functions, torch's own, and defaults."""
    factor = 1.0

    def scaled(y, by=1.0):
        return y * by * GLOBAL * factor

    fused = samfast.fuse(model())
    monkeypatch.setattr(Block, "forward", lambda self, x, **_: x)
    assert "takes (self, x, **_)" in samfast.report(fused).blocks["0"]

    def forward(self, x):
        return scaled(stock(self, x))

    stock = STOCK[Block]
    monkeypatch.setattr(Block, "forward", forward)

    def states():
        return {s.partition(" (")[0] for s in samfast.report(fused).blocks.values()}

    another = {"not fused: its forward gives another output"}
    assert states() == {"fused"}
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", 2.0)
    assert states() == another
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", 1.0)
    factor = 3.0
    assert states() == another
    factor = 1.0
    assert states() == {"fused"}
    monkeypatch.setattr(scaled, "__defaults__", (2.0,))
    assert states() == another
    monkeypatch.setattr(scaled, "__defaults__", (1.0,))
    assert states() == {"fused"}
    pad = functools.wraps(F.pad)(lambda t, sides: factor * t)
    monkeypatch.setattr(F, "pad", pad)
    assert states() == {
        "not fused: the forward of Block uses torch.nn.functional.pad, which was replaced"
    }


SIZES = {
    "window": ((3, (8, 8)), lambda m, x, stock: stock(m, x) * (2 - (m.window_size != 3))),
    "heads": ((4, (8, 8)), lambda m, x, stock: stock(m, x) * (2 - (m.attn.num_heads != 4))),
    "scale": ((4, (8, 8)), lambda m, x, stock: stock(m, x) * (2 - (m.attn.scale != 0.5))),
    "one image": ((4, (8, 8)), lambda m, x, stock: stock(m, x) * (2 - (x.shape[0] != 1))),
    "small ones": (
        (4, (8, 8)),
        lambda m, x, stock: stock(m, F.layer_norm(x, x.shape[-1:], eps=1e-3) - stock(m, x) + x),
    ),
}


@pytest.mark.parametrize("name", [n for n in SIZES if n != "small ones"])
def test_a_forward_that_looks_at_its_sizes(name, monkeypatch):
    """The verdict of one window, number of heads or scale is not that of another."""
    (window, size), change = SIZES[name]
    monkeypatch.setattr(Block, "forward", patched(Block, change))
    if name != "one image":
        assert proof.objection(block(4).float()) is None
    layer = block(window, size, heads=4 if name == "heads" else 2).float()
    if name == "scale":
        layer.attn.scale = 0.5
    assert proof.objection(layer) == (
        "its forward gives another output (1e+02 % off) at this size, under no_grad"
    )


def test_a_forward_that_knows_large_sizes(monkeypatch):
    """No run is made at them."""
    change = patched(Block, lambda m, x, stock: stock(m, x) * (2 if x.shape[1] > 200 else 1))
    monkeypatch.setattr(Block, "forward", change)
    assert proof.objection(block(4).float()) == "the forward of Block uses the number 200"


def test_sizes_that_are_not_numbers():
    layer = block(4)
    layer.attn.scale = nn.Parameter(torch.tensor(0.25))
    with pytest.warns(UserWarning, match="one of its sizes is a Parameter, not a number"):
        samfast.fuse(nn.Sequential(layer))


def test_a_forward_that_gives_something_else(monkeypatch):
    monkeypatch.setattr(Block, "forward", patched(Block, lambda m, x, stock: (stock(m, x), 0.0)))
    assert proof.objection(block(4)) == "its forward gives tuple in train mode"
    monkeypatch.setattr(Block, "forward", patched(Block, lambda m, x, stock: stock(m, x)[:1]))
    assert "gives a tensor of shape (1, 5, 3, 32)" in proof.objection(block(4))
    monkeypatch.setattr(Block, "forward", patched(Block, lambda m, x, stock: m.lin1(x)))
    assert "fails alone: AttributeError" in proof.objection(block(4))


class Linear(nn.Linear):
    """change: what it does to its result."""

    change = staticmethod(lambda self, y: y)

    def forward(self, x):
        return self.change(self, super().forward(x))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda self, y: y, None),
        (lambda self, y: y * 1.001, r"gives another output \(0.1 % off\) in train mode"),
        (lambda self, y: y + self.training, "another output .* in train mode"),
        (lambda self, y: y + (not self.training), "another output .* in eval mode"),
        (lambda self, y: F.dropout(y, 0.5, self.training), "another output .* in train mode"),
        (lambda self, y: y.detach(), "another gradient of x .* in train mode"),
        (lambda self, y: y.detach() + 0 * y, "another gradient of x .* in train mode"),
        (lambda self, y: y + 0 * HIDDEN, "trains a tensor that is not its own in train mode"),
        (lambda self, y: (y,), "gives tuple"),
        (lambda self, y: y.nothing, "fails alone: AttributeError"),
    ],
)
def test_the_probe(change, problem, monkeypatch):
    monkeypatch.setattr(Linear, "change", staticmethod(change))
    layer, x = Linear(5, 3), torch.randn(4, 5)

    def formula(x, given):
        return F.linear(x, given["weight"], given["bias"])

    found = probe.apart(lambda: probe.difference(layer, formula, x))
    assert found is None if problem is None else re.search(problem, found)


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

    own = STOCK[kind]

    def forward(self, x, task_idx=None):
        return own(self, x)

    monkeypatch.setattr(kind, "forward", forward)
    left_alone(
        fused, stock, rf"the forward of {kind.__name__} takes \(self, x, task_idx=None\), not .*"
    )
    monkeypatch.setattr(kind, "forward", functools.partialmethod(forward, task_idx=1))
    assert "takes " in proof.objection(fused[0])


def test_a_harmless_patch_stays_fused(monkeypatch):
    """As a copy with other line breaks and names would."""
    fused, stock = samfast.fuse(model()), STOCK[Block]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = stock(self, x)
        return result

    monkeypatch.setattr(Block, "forward", forward)
    assert set(samfast.report(fused).blocks.values()) == {"fused"}


def test_wraps_does_not_hide_what_it_takes(monkeypatch):
    stock = STOCK[Block]

    @functools.wraps(stock)
    def forward(self, x, task=None):
        return stock(self, x)

    monkeypatch.setattr(Block, "forward", forward)
    assert "takes (self, x, task=None), not (self, x)" in proof.objection(block(4))


def test_attributes_that_nothing_reads(monkeypatch):
    """Numbers, counters of hooks, objects: no probe, and no other answer."""
    fused = samfast.fuse(nn.ModuleList(block(4).float() for _ in range(3)))
    monkeypatch.setattr(proof, "_judgement", lambda *_: pytest.fail("asked again"))
    circle = []
    circle.append(circle)
    for i, layer in enumerate(fused):
        layer.layer_id, layer.attn.options, layer.mlp.circle = i, object(), circle
        layer.calls = 0
    assert set(samfast.report(fused).blocks.values()) == {"fused"}


@pytest.mark.parametrize("name", ["memory", "backend"])
def test_attributes_that_fused_modules_need_themselves(name):
    stock, fused = model(), model()
    setattr(fused[0] if name == "memory" else fused[0].attn, name, 0.5)
    with pytest.warns(UserWarning, match=f"it has an attribute {name}, which a fused module needs"):
        samfast.fuse(fused)
    assert torch.equal(fused[0](torch.ones(1, 5, 5, 32)), stock[0](torch.ones(1, 5, 5, 32)))


def test_an_attention_that_takes_more(monkeypatch):
    """A second argument is not the side of windows."""
    own = STOCK[Attention]

    def shifted(self, x, shift=0):
        return own(self, x.roll(shift, 1)) if shift else own(self, x)

    def forward(self, x):
        return x + self.attn(self.norm1(x), 2) + self.mlp(self.norm2(x))

    fused, stock = samfast.fuse(model()), model()
    monkeypatch.setattr(Attention, "forward", shifted)
    monkeypatch.setattr(Block, "forward", forward)
    left_alone(fused, stock, r"the forward of Attention takes \(self, x, shift=0\).*")


def test_left_alone_in_several_threads(monkeypatch):
    """Blocks that share an attention with one that is left alone, at the same time."""
    fused, stock, x = samfast.fuse(model()), model(), torch.randn(1, 6, 7, 32)
    monkeypatch.setattr(Block, "forward", patched(Block, CHANGES["a factor"][0]))
    with torch.no_grad():
        expected = stock(x)
    answers = []

    def work():
        with torch.no_grad():
            answers.extend(torch.equal(fused(x), expected) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 80 and all(answers)


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

    def scaled(self, x):
        return torch.nn.Module.__call__(self, x) * 1.01

    def forward(self, input):
        return 1.01 * own(self, input)

    monkeypatch.setattr(kind, "forward", forward)
    left_alone(fused, stock, "the forward of .* uses own")
    monkeypatch.undo()
    assert samfast.report(fused).blocks["0"] == "fused"
    monkeypatch.setattr(kind, "__call__", scaled)
    left_alone(fused, stock, f"{kind.__name__} has a __call__ of its own")


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


@pytest.mark.slow_on_cpu
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
    assert "samfast.fused.proof" not in sys.modules
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
