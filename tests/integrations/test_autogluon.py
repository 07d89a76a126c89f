# SPDX-License-Identifier: Apache-2.0
"""AutoGluon's ConvLoRALinear fused: numbers, random numbers, as a drop-in, what is left alone."""

import copy
import functools
import pickle
import types

import pytest
import torch
from autogluon_layers import MODULE, REAL, TWIN, downloaded, exact, layer, loaded, maps, rows, run
from budgets import all_within_budget
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import samfast
from samfast.integrations import autogluon_proof

STATE = "fused: autogluon's ConvLoRALinear"


@pytest.fixture(params=["twin", REAL])
def classes(request, monkeypatch, tmp_path):
    """Of the twin, and of AutoGluon's own file."""
    return loaded(TWIN if request.param == "twin" else downloaded(tmp_path), monkeypatch)


@pytest.fixture
def twin(monkeypatch):
    return loaded(TWIN, monkeypatch)


def pair(stock):
    fused = samfast.fuse(copy.deepcopy(stock))
    assert samfast.report(fused).others == {"": STATE}
    return fused


def same_bits(ours, theirs):
    assert [*ours] == [*theirs]
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name


def as_exact_as(fused, stock, x):
    ours = run(fused, x)
    stocks, exacts = functools.partial(run, stock, x), functools.partial(exact, stock, x)
    return all_within_budget(ours, stocks, exacts, torch.float32)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("x", [maps, rows], ids=lambda make: make.__name__)
def test_every_gradient(classes, x, training):
    stock = layer(classes).train(training)
    stock.weight.requires_grad_(True)
    fused = pair(stock)
    as_exact_as(fused, stock, x())
    y, loss = fused(x())
    theirs = stock(x())
    assert (y.dtype, loss.dtype, loss.shape) == (theirs[0].dtype, theirs[1].dtype, theirs[1].shape)


def test_every_expert_is_chosen_in_the_test_above(twin):
    """A gradient of zero would be compared with another."""
    made = run(layer(twin).eval(), maps())
    used = [n for n, grad in made.items() if n.endswith(".0.bias") and grad.any()]
    assert len(used) >= 5


def test_untrained_gate_chooses_as_topk_does(classes):
    """All logits are equal then, and topk does not take the first."""
    stock = layer(classes).eval()
    nn.init.zeros_(stock.lora_moe_gating.w_gate)
    as_exact_as(pair(stock), stock, maps())


def test_random_numbers_are_the_owners(classes):
    """One seed gives the same choices, and the same state of the generator afterwards."""
    stock = layer(classes)
    fused, found = pair(stock), []
    for module in (stock, fused):
        torch.manual_seed(9)
        loss = module(maps())[1]
        found.append((loss.item(), torch.get_rng_state()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert torch.equal(found[0][1], found[1][1])


def test_dropout_acts_in_training_only(classes):
    stock = layer(classes, lora_dropout=0.5)
    fused = pair(stock)
    first, second = (run(fused, maps(), seed) for seed in (1, 2))
    assert not torch.equal(first["y"], second["y"])
    as_exact_as(fused.eval(), stock.eval(), maps())


def test_autocast(twin):
    """AutoGluon's own file fails on a CPU there, whose softmax stays narrow."""
    stock = layer(twin)
    fused = pair(stock)

    def narrow(module):
        with torch.autocast("cpu", torch.bfloat16):
            return run(module, maps())

    ours, theirs = narrow(fused), narrow(stock)
    assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in theirs.items()}
    exacts = functools.partial(exact, stock, maps())
    names = ("y", "dx", "lora_A", "lora_B")
    all_within_budget(
        {n: ours[n] for n in names}, lambda: narrow(stock), exacts, torch.bfloat16, some=True
    )


def test_state_and_identity(classes, tmp_path):
    stock = layer(classes)
    fused = copy.deepcopy(stock)
    held, optimizer = dict(fused.named_parameters()), torch.optim.AdamW(fused.parameters(), 1e-2)
    assert samfast.fuse(fused) is fused and samfast.fuse(fused) is fused
    assert all(fused.get_parameter(name) is p for name, p in held.items())
    assert isinstance(fused, classes.ConvLoRALinear)
    assert [*fused.state_dict()] == [*stock.state_dict()]
    run_backward(fused)
    optimizer.step()
    assert not torch.equal(fused.lora_A, stock.lora_A)
    torch.save(fused.state_dict(), tmp_path / "layer.pt")
    plain = layer(classes)
    plain.load_state_dict(torch.load(tmp_path / "layer.pt"))
    for name, value in fused.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name


def run_backward(module):
    y, loss = module(maps())
    (y.square().mean() + loss).backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused(twin, copied):
    fused = pair(layer(twin).eval())
    twice = copied(fused)
    assert samfast.report(twice).others == {"": STATE}
    assert torch.equal(twice(maps())[0], fused(maps())[0])


def test_unfuse_gives_the_same_bits(twin):
    stock = layer(twin)
    fused = samfast.unfuse(pair(stock))
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    same_bits(run(fused, maps()), run(stock, maps()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_draw_the_same_noise_again(twin, reentrant):
    fused = pair(layer(twin))
    call = functools.partial(checkpoint, fused, use_reentrant=reentrant)
    plain = run(fused, maps())
    if reentrant:
        torch.manual_seed(3)
        x = maps().requires_grad_()
        y, loss = call(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
        ((y * dy).sum() + 50 * loss).backward()
        assert torch.equal(x.grad, plain["dx"]) and torch.equal(fused.lora_A.grad, plain["lora_A"])
        return
    for name, value in run(fused, maps(), call=call).items():
        assert torch.equal(plain[name], value), name


def test_saves_less_than_the_owners(twin):
    def saved(module):
        counted = {}

        def keep(tensor):
            counted[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            kept = module(maps().requires_grad_())
        return sum(counted.values()), kept

    stock = layer(twin)
    assert saved(pair(stock))[0] < saved(stock)[0] / 2


@pytest.mark.slow_on_cpu
def test_compiled(twin):
    fused = pair(layer(twin).eval())
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(maps())[0], fused(maps())[0])


def r_zero(classes):
    return classes.ConvLoRALinear(8, 24, r=0)


def transposed(classes):
    return layer(classes, fan_in_fan_out=True)


def merged(classes):
    module = layer(classes)
    module.merged = True
    return module


def without_a_bias(classes):
    module = layer(classes)
    module.lora_moe_experts[2][0].bias = None
    return module


def of_one_expert(classes):
    return layer(classes, conv_lora_expert_num=1)


def weighted(classes):
    module = layer(classes)
    module.multiply_by_gates = True
    return module


def without_noise(classes):
    module = layer(classes)
    module.lora_moe_gating.noisy_gating = False
    return module


def of_other_noise(classes):
    module = layer(classes)
    module.lora_moe_gating.std.fill_(2.0)
    return module


def of_another_activation(classes):
    module = layer(classes)
    module.lora_moe_experts[1][1] = nn.ReLU()
    return module


def with_a_child(classes):
    module = layer(classes)
    module.norm = nn.LayerNorm(3)
    return module


def hooked_gate(classes):
    module = layer(classes)
    module.lora_moe_gating.register_forward_hook(lambda gate, args, y: y)
    return module


def hooked_expert(classes):
    module = layer(classes)
    module.lora_moe_experts[3][0].register_forward_hook(lambda conv, args, y: 2 * y)
    return module


def derived(classes):
    class Mine(classes.ConvLoRALinear):
        pass

    module = layer(classes)
    module.__class__ = Mine
    return module


def of_a_copy(classes):
    module = layer(classes)
    kind = type("ConvLoRALinear", (classes.ConvLoRALinear,), {"__module__": "mine.layers"})
    module.__class__ = kind
    return module


def with_another_gate(classes):
    class Gate(classes.MoEGate):
        def forward(self, h):
            gates, loss = super().forward(h)
            return gates, 2 * loss

    module = layer(classes)
    module.lora_moe_gating.__class__ = Gate
    return module


LEFT_ALONE = {
    r_zero: "which has no lora_moe_gating",
    transposed: "which has a transposed weight (fan_in_fan_out)",
    merged: "which has merged=True, not False",
    without_a_bias: "which has no lora_moe_experts.2.0.bias",
    of_one_expert: "which has 1 experts, not from 2 to 4096",
    weighted: "which has multiply_by_gates=True, not False",
    without_noise: "which has noisy_gating=False, not True",
    of_other_noise: "which has std=[2.0], not [1.0]",
    of_another_activation: "which has torch's ReLU as lora_moe_experts.1.1, not nn.GELU",
    with_a_child: "which has a child norm, which would be left out",
    hooked_gate: "which has hooks or a forward of its own on lora_moe_gating",
    hooked_expert: "which has hooks or a forward of its own on lora_moe_experts.3.0",
    derived: f"which is not the class of {MODULE}, and samfast trusts no other",
    of_a_copy: f"which is not the class of {MODULE}, and samfast trusts no other",
    with_another_gate: "which has a gate whose forward is not AutoGluon's",
}


@pytest.mark.parametrize("make", LEFT_ALONE, ids=lambda make: make.__name__)
def test_left_alone(twin, make):
    stock = make(twin)
    other = samfast.fuse(nn.ModuleList([copy.deepcopy(stock), layer(twin)]))[0]
    assert type(other) is type(stock)
    state = samfast.report(other).others[""]
    assert state.partition(", ")[2] == LEFT_ALONE[make]
    if make is r_zero:  # whose forward fails, as AutoGluon's does
        return
    x = maps()
    same_bits(run(other, x), run(stock, x))


OTHER_VERSIONS = {  # what stands in the twin's file: in its place, and what the run finds
    "0.01 * (self.cv": ("0.02 * (self.cv", "another output"),
    "z = h + parts": ("z = parts", "another output"),
    "chosen = gates.argmax(1)": ("chosen = gates.argmin(1)", "another output"),
    "* spread\n": ("* spread.detach()\n", "another gradient of x"),
}


@pytest.mark.parametrize("line", OTHER_VERSIONS)
def test_another_version_of_the_library_is_run_first(monkeypatch, tmp_path, line):
    other, reason = OTHER_VERSIONS[line]
    text = TWIN.read_text()
    assert text.count(line) == 1
    file = tmp_path / "adaptation_layers.py"
    file.write_text(text.replace(line, other))
    state = samfast.report(layer(loaded(file, monkeypatch))).others[""]
    assert state.startswith("not fused: autogluon's ConvLoRALinear, but its forward ")
    assert reason in state


def test_what_is_patched_is_left_alone(twin, monkeypatch):
    stock = layer(twin)
    monkeypatch.setattr(twin.SparseDispatcher, "split", lambda self, h: [])
    assert samfast.report(stock).others[""].endswith("whose SparseDispatcher.split was replaced")
    monkeypatch.undo()


def doubled(module):
    module.lora_moe_gating.register_forward_hook(lambda gate, args, y: (y[0], 2 * y[1]))
    return "has hooks or a forward of its own on lora_moe_gating"


def scaled_noise(module):
    module.lora_moe_gating.std.mul_(3)
    return "has std=[3.0], not [1.0]"


def scaled_noise_as_data(module):
    module.lora_moe_gating.std.data.mul_(3)
    return "has std=[3.0], not [1.0]"


@pytest.mark.parametrize("change", [doubled, scaled_noise, scaled_noise_as_data])
def test_what_is_changed_after_fuse_runs_the_owners_forward(twin, change):
    stock = layer(twin)
    fused = pair(stock)
    fused(maps())
    for module in (stock, fused):
        reason = change(module)
    assert samfast.report(fused).others[""] == f"not fused: autogluon's ConvLoRALinear {reason}"
    same_bits(run(fused, maps()), run(stock, maps()))


def of_a_method_of_the_gate(twin, fused, monkeypatch):
    monkeypatch.setattr(twin.MoEGate, "cv_squared", lambda self, v: 5 * v.sum())
    return _ANOTHER.format("MoEGate.cv_squared")


def of_a_method_of_this_gate(twin, fused, monkeypatch):
    fused.lora_moe_gating.cv_squared = lambda v: 5 * v.sum()
    return _ANOTHER.format("lora_moe_gating.cv_squared")


def of_the_class_of_the_gate(twin, fused, monkeypatch):
    class Gate(twin.MoEGate):
        def cv_squared(self, v):
            return 5 * v.sum()

    fused.lora_moe_gating.__class__ = Gate
    return _ANOTHER.format("Gate")


def of_the_class_that_sorts(twin, fused, monkeypatch):
    class Sorts(twin.SparseDispatcher):
        def gathered(self, parts):
            return 2 * super().gathered(parts)

    monkeypatch.setattr(twin, "SparseDispatcher", Sorts)
    return _ANOTHER.format("SparseDispatcher")


def of_torchs_functions(twin, fused, monkeypatch):
    parts = types.SimpleNamespace(**vars(twin.F))
    parts.linear = lambda *args: 2 * F.linear(*args)
    monkeypatch.setattr(twin, "F", parts)
    return _ANOTHER.format("F")


def of_an_activation(twin, fused, monkeypatch):
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: 2 * x)
    return _ANOTHER.format("GELU.forward")


def of_a_default(twin, fused, monkeypatch):
    monkeypatch.setattr(twin.MoEGate.forward, "__defaults__", (0.5,))
    return "is not what its name says: its forward gives another output"


def test_code_is_read_once(twin, monkeypatch):
    """While nothing was replaced."""
    fused = pair(layer(twin))
    monkeypatch.setattr(autogluon_proof, "CodeWatch", lambda *_: pytest.fail("read again"))
    fused(maps())


_ANOTHER = "has another {} than AutoGluon's; undo that to fuse it"
REPLACED = (
    of_a_method_of_the_gate,
    of_a_method_of_this_gate,
    of_the_class_of_the_gate,
    of_the_class_that_sorts,
    of_torchs_functions,
    of_an_activation,
    of_a_default,
)


@pytest.mark.parametrize("change", REPLACED, ids=lambda change: change.__name__)
def test_helpers_that_are_replaced(twin, monkeypatch, change):
    """After fuse the owner's forward runs; and what is built then is left alone."""
    fused, fresh = pair(layer(twin)), layer(twin)
    reason = change(twin, fused, monkeypatch)
    state = samfast.report(fused).others[""]
    assert state.startswith(f"not fused: autogluon's ConvLoRALinear {reason}")
    stock = samfast.unfuse(copy.deepcopy(fused))
    same_bits(run(fused, maps()), run(stock, maps()))
    if change not in (of_a_method_of_this_gate, of_the_class_of_the_gate):
        assert samfast.report(fresh).others[""].endswith(("was replaced", "in train mode"))
    monkeypatch.undo()
    if change in (of_the_class_that_sorts, of_a_default):
        assert samfast.report(fused).others == {"": STATE}


def test_other_dtypes_run_the_owners_forward(classes):
    """Which takes float32 only: what it says of others is said."""
    fused = pair(layer(classes))
    fused.bfloat16()
    state = samfast.report(fused).others[""]
    assert state.endswith("has a weight of bfloat16, while AutoGluon's forward takes float32")


def test_other_shapes_run_the_owners_forward(classes):
    """A length that is no square, and no samples."""
    stock = layer(classes).eval()
    fused = pair(stock)
    for x in (maps().flatten(1, 2), maps()[0, 0], maps()[:0]):
        for module in (stock, fused):
            with pytest.raises((RuntimeError, ValueError, IndexError)):
                module(x)


def test_calls_of_the_owner_are_named(twin, tmp_path):
    model = samfast.fuse(nn.Sequential(layer(twin)))
    owners = "the adapters of this Sequential are autogluon's; "
    with pytest.raises(ValueError, match=owners + r"save them with predictor.save"):
        samfast.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=owners + "Conv-LoRA depends on its input"):
        samfast.merge(model)
    with pytest.raises(ValueError, match=owners + r"each layer returns \(result, moe_loss\)"):
        samfast.aux_loss(model)
    with pytest.raises(ValueError, match="0 already has an adapter, autogluon's ConvLoRALinear"):
        samfast.attach(model, samfast.Lora(), train=())
    found = samfast.report(model)
    assert found.adapter_parameters == sum(
        p.numel() for n, p in model.named_parameters() if "lora_" in n
    )
    assert {*found.backends} == {"conv_experts", "expert_gate", "lora_linear"}
