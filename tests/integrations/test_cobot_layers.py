# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT's own layers fused: numbers, shared coefficients, as drop-ins, what is left alone."""

import copy
import pickle

import black_box
import cobot_twins as cobot
import pytest
import torch
from black_box import Subject
from budgets import all_within_budget
from cobot_models import KINDS, MODELS, WIDTH, adapters, layer_of, lora, related
from cobot_twins import hamilton
from peft_models import DEPTH, block_calls, maps, run, trunk
from torch import nn
from wrapped_models import as_exact_as

import samfast

HEADS = {"functions": cobot.QuaternionLinear, "autograd": cobot.WithFunction}
QUICK = ("lora-autocast", "lora-checkpointing", "related-autocast", "adapter-copies")


def same_bits(ours, theirs):
    assert [*ours] == [*theirs]
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name


def fused_of(stock):
    return samfast.fuse(copy.deepcopy(stock))


def without_cp(kind):
    """The class, but that it leaves nothing behind for which it cannot be copied."""

    def forward(self, x):
        y = kind.forward(self, x)
        del self.CP
        return y

    return named(kind, forward)


@pytest.mark.slow_on_cpu(but=QUICK)
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_black_box(kind, check):
    """A block with windows; of adapters one alone, and one in its block."""
    model = (lora() if kind == "lora" else MODELS[kind](dropout=0.0)).double()
    stock = model.blocks[0] if kind != "adapter" else model.blocks[0].mlp
    ours = fused_of(stock)
    assert ours.block_problem() is None
    if kind != "adapter":
        layer = stock.attn.qkv if kind == "lora" else stock.mlp
        layer.__class__ = without_cp(type(layer))
    check(Subject(ours, stock, maps(3, torch.float64)))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["lora", "related"])
def test_every_gradient(kind, head):
    """Of FacT_c and FacT_p, which all blocks share, too."""
    stock = MODELS[kind](HEADS[head]).eval()
    fused = fused_of(stock)
    assert block_calls(fused, maps()) == DEPTH
    assert [*fused.state_dict()] == [*stock.state_dict()]
    assert {*samfast.report(fused).others.values()} == {f"fused: cobot_twins' {KINDS[kind]}"}
    first, last = (layer_of(fused, kind, block) for block in (0, -1))
    assert first.FacT_c is last.FacT_c and first.FacT_p is last.FacT_p
    as_exact_as(fused, stock, maps())


@pytest.mark.parametrize("kind", ["lora", "related"])
def test_a_head_that_takes_square_maps_only(kind):
    """SAM-COBOT's own unpacks its input as (batch, side, side, features)."""
    stock = layer_of(MODELS[kind](cobot.OnSquares).eval(), kind)
    fused = fused_of(stock)
    assert {*samfast.report(fused).others.values()} == {f"fused: cobot_twins' {KINDS[kind]}"}
    with pytest.raises(RuntimeError, match="shape"), torch.no_grad():
        stock(maps())
    as_exact_as(fused, stock, maps()[:, :, :5])


@pytest.mark.parametrize("scale", ["1.0", "0.5", "learnable_scalar"])
def test_every_gradient_of_an_adapter(scale):
    stock = adapters(adapter_scalar=scale).eval()
    fused = fused_of(stock)
    assert block_calls(fused, maps()) == (0 if scale == "learnable_scalar" else DEPTH)
    as_exact_as(fused, stock, maps())
    as_exact_as(fused.blocks[0].mlp, stock.blocks[0].mlp, maps())
    assert samfast.report(fused).backends["adapt_former"]


def test_the_gradient_of_what_is_shared_is_the_sum():
    """Over the blocks: each alone with a copy of its own gives its part."""
    fused = fused_of(lora())
    names = ("FacT_c", "FacT_p")
    whole = run(fused, maps())
    for block in fused.blocks:
        for name in names:
            layer = block.attn.qkv
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().clone()))
    apart = run(fused, maps())
    for name in names:
        parts = [apart[f"blocks.{i}.attn.qkv.{name}"] for i in range(DEPTH)]
        assert all(part.any() for part in parts)
        torch.testing.assert_close(whole[f"blocks.0.attn.qkv.{name}"], sum(parts))


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("memory", ["balanced", "minimal"])
def test_every_memory(memory):
    stock = lora()
    fused = samfast.fuse(copy.deepcopy(stock), memory)
    assert block_calls(fused, maps()) == DEPTH
    as_exact_as(fused, stock, maps())


@pytest.mark.parametrize("make", [adapters, related])
def test_dropout_has_the_owners_distribution(make):
    """Other random numbers, in training only: the mean of many runs is the owner's result."""
    stock = make(dropout=0.5).blocks[0].mlp
    fused, x = fused_of(stock), maps(1)
    torch.manual_seed(0)
    with torch.no_grad():
        base = stock.mlp(x)
        made = [torch.stack([m(x) for _ in range(100)]) - base for m in (fused, stock)]
        wanted = stock.eval()(x) - base
    for branch in made:
        off = (branch.mean(0) - wanted).norm() / (branch.std(0) / 10).norm()
        assert 0.8 < off < 1.2
    assert made[0].std(0).norm() == pytest.approx(made[1].std(0).norm().item(), rel=0.05)
    as_exact_as(fused.eval(), stock, x)


def test_what_the_owner_leaves_behind_is_not():
    """A tensor with a graph, for which the owner's layer cannot be copied."""
    stock = lora()
    fused = fused_of(stock)
    for model in (stock, fused):
        model(maps())
    assert hasattr(stock.blocks[0].attn.qkv, "CP")
    assert not hasattr(fused.blocks[0].attn.qkv, "CP")
    copy.deepcopy(fused)


def test_what_the_owner_left_behind_is_dropped():
    stock = lora()
    stock(maps())
    fused = samfast.fuse(stock)
    assert not hasattr(fused.blocks[0].attn.qkv, "CP")
    copy.deepcopy(fused)


def hooked_mlp(mlp):
    mlp.register_forward_hook(lambda module, args, y: 2 * y)
    return "mlp has hooks or a forward of its own on mlp"


def derived_mlp(mlp):
    mlp.__class__ = type("Doubled", (type(mlp),), {"forward": lambda self, x: 2 * self.lin1(x)})
    mlp.lin1 = nn.Linear(WIDTH, WIDTH)
    return "mlp has test_cobot_layers' Doubled inside"


def larger_mlp(mlp):
    mlp.norm = nn.LayerNorm(WIDTH)
    return "mlp has a child norm, which would be left out"


@pytest.mark.parametrize("change", [hooked_mlp, derived_mlp, larger_mlp])
def test_another_mlp_inside_runs_in_parts(change):
    """The branch alone is fused there."""
    stock = adapters(dropout=0.0)
    reason = change(stock.blocks[0].mlp.mlp)
    fused = fused_of(stock)
    found = samfast.report(fused)
    assert found.blocks["blocks.0"] == f"fused in parts: {reason}"
    assert {*found.others.values()} == {"fused: cobot_twins' Adapter"}
    assert block_calls(fused, maps()) == DEPTH - 1
    as_exact_as(fused, stock, maps())


def test_other_arguments_run_the_owners_forward():
    stock = adapters(dropout=0.0).blocks[0].mlp
    fused, x = fused_of(stock), maps()
    for given in ({"residual": 2 * x}, {"add_residual": False}):
        assert torch.equal(fused(x, **given), stock(x, **given))
    rows = maps().flatten(1, 2)
    for layer in (stock, related(dropout=0.0).blocks[0].mlp, lora().blocks[0].attn.qkv):
        layer.__class__ = named(type(layer), twice_on_rows(type(layer).forward))
        assert torch.equal(fused_of(layer)(rows), layer(rows))


class Narrow(nn.Module):
    """An MLP whose result has another shape."""

    def __init__(self):
        super().__init__()
        self.lin1, self.lin2, self.act = nn.Linear(WIDTH, 8), nn.Linear(8, 1), nn.GELU()

    def forward(self, x):
        return self.lin2(self.act(self.lin1(x)))


def test_an_mlp_of_another_shape_runs_the_owners_forward_as_it_was_called():
    stock = adapters(dropout=0.0).blocks[0].mlp
    forward = cobot.Adapter.forward

    def of_another_residual(self, x, add_residual=True, residual=None):
        return forward(self, x) if residual is None else 2 * forward(self, x)

    stock.__class__, stock.mlp = named(type(stock), of_another_residual), Narrow()
    fused = fused_of(stock)
    assert fused.block_problem() is None
    assert torch.equal(fused(maps()), stock(maps()))


def twice_on_rows(forward):
    """No run shows what a forward does with x that is not a map."""

    def alone(self, x):
        return forward(self, x) * (2 if x.dim() == 3 else 1)

    def with_more(self, x, add_residual=True, residual=None):
        return forward(self, x) * (2 if x.dim() == 3 else 1)

    return alone if "residual" not in forward.__code__.co_varnames else with_more


def replica(module):
    """As DataParallel makes it: parameters are plain tensors, with a graph to the module's."""
    made = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, copied in made.items():
        for name, child in part._modules.items():
            setattr(copied, name, made[child])
        for name, parameter in part._parameters.items():
            setattr(copied, name, parameter * 1.0)
    return made[module]


@pytest.mark.parametrize("scale", ["0.5", "learnable_scalar"])
def test_a_replica_runs_the_owners_forward(scale):
    stock = adapters(dropout=0.0, adapter_scalar=scale).blocks[0].mlp
    fused = replica(fused_of(stock))
    assert fused.block_problem().startswith("is a replica of nn.DataParallel")
    assert torch.equal(fused(maps()), stock(maps()))


@pytest.mark.parametrize("kind", MODELS)
def test_unfuse_gives_the_same_bits(kind):
    stock, x = MODELS[kind]().eval(), maps()
    fused = copy.deepcopy(stock)
    before = [*fused.modules()]
    assert samfast.fuse(fused) is fused and samfast.fuse(fused) is fused
    assert all(a is b for a, b in zip(before, fused.modules(), strict=True))
    assert isinstance(layer_of(fused, kind), getattr(cobot, KINDS[kind]))
    samfast.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    same_bits(run(fused, x), run(stock, x))


@pytest.mark.parametrize("kind", MODELS)
def test_files_and_copies(kind, tmp_path):
    fused = samfast.fuse(MODELS[kind]().eval())
    optimizer = torch.optim.AdamW([p for p in fused.parameters() if p.requires_grad], 0.1)
    fused(maps()).square().mean().backward()
    optimizer.step()
    torch.save(fused.state_dict(), tmp_path / "sam_model_best.pth")
    plain = MODELS[kind]().eval()
    before = copy.deepcopy(plain.state_dict())
    plain.load_state_dict(torch.load(tmp_path / "sam_model_best.pth"))
    state = fused.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert any(not torch.equal(before[name], value) for name, value in state.items())
    optimizer.zero_grad()
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(maps()), fused(maps()))
        assert {*samfast.report(twin).others.values()} == {*samfast.report(fused).others.values()}


def named(base, forward, **names):
    """A class of the name with another forward."""
    names = {"forward": forward, "__module__": __name__, **names}
    return type(base.__name__, (base,), names)


def of_the_next_slice(self, x):
    packed = self.qkv(x)
    self.CP = (self.FacT_c @ self.FacT_p)[..., self.idx + 1 : self.idx + 2]
    q, v = self.linear_a_q(x), self.linear_a_v(x)
    q = self.FacT_d1(q * self.CP[:, :, 0] + q * self.gamma[:4])
    v = self.FacT_d2(v * self.CP[:, :, 0] + v * self.gamma[-4:])
    packed[..., : self.dim] += self.linear_b_q(q)
    packed[..., -self.dim :] += self.linear_b_v(v)
    return packed


def with_a_count(self, x):
    self.calls = 1
    return cobot._LoRA_qkv_relation_add.forward(self, x)


def by_a_switch(self, x):
    packed = self.qkv(x)
    if self.relation:
        packed[..., : self.dim] += self.linear_b_q(self.FacT_d1(self.linear_a_q(x)))
    return packed


def dropped_late(self, x, add_residual=True, residual=None):
    y = self.up_proj(self.non_linear_func(self.down_proj(self.adapter_layer_norm_before(x))))
    y = nn.functional.dropout(y, p=self.dropout, training=self.training)
    return y * self.scale + self.mlp(x)


def of_x_itself(self, x, add_residual=True, residual=None):
    y = self.up_proj(self.non_linear_func(self.down_proj(self.adapter_layer_norm_before(x))))
    return y * self.scale + self.mlp(x) + x


def asked_for(self, x, add_residual=True, residual=None):
    if not hasattr(self, "CP"):
        self.CP = (self.FacT_c @ self.FacT_p)[..., self.idx]
    return of_cp(self, x)


def set_in_training(self, x, add_residual=True, residual=None):
    if self.training:
        self.CP = (self.FacT_c @ self.FacT_p)[..., self.idx]
    z = self.FacT_d1(self.down_proj(self.adapter_layer_norm_before(x)) * (self.CP + self.gamma))
    z = nn.functional.dropout(self.non_linear_func(z), p=self.dropout, training=self.training)
    return self.up_proj(z) * self.scale + self.mlp(x)


def read_first(self, x, add_residual=True, residual=None):
    y = of_cp(self, x)
    self.CP = (self.FacT_c @ self.FacT_p)[..., self.idx]
    return y


def of_cp(self, x):
    h = self.down_proj(self.adapter_layer_norm_before(x))
    z = self.non_linear_func(self.FacT_d1(h * (self.CP + self.gamma)))
    z = nn.functional.dropout(z, p=self.dropout, training=self.training)
    return self.up_proj(z) * self.scale + self.mlp(x)


def of_one_argument(self, x):
    return self.mlp(x)


_RUN = "is not what its name says: its forward gives another output"
_CODE = "has code that a run may not tell all of: the forward of "
FORWARDS = {
    of_the_next_slice: ("lora", _RUN),
    with_a_count: ("lora", f"{_CODE}_LoRA_qkv_relation_add uses "),
    by_a_switch: ("lora", f"{_CODE}_LoRA_qkv_relation_add uses relation"),
    dropped_late: ("adapter", _RUN),
    of_x_itself: ("adapter", _RUN),
    asked_for: ("related", f"{_CODE}Adapter_relation uses hasattr, and 'CP'"),
    set_in_training: ("related", f"{_CODE}Adapter_relation uses CP, which it does not set at each"),
    read_first: ("related", f"{_CODE}Adapter_relation uses CP before it is set"),
    of_one_argument: (
        "adapter",
        "has a forward that takes (self, x), not (self, x, add_residual=True, residual=None)",
    ),
}


def left_alone(stock, kind):
    """Why the layer of the first block is left alone; it runs as it did."""
    fused = fused_of(stock)
    assert type(layer_of(fused, kind)) is type(layer_of(stock, kind))
    name = "blocks.0.attn.qkv" if kind == "lora" else "blocks.0.mlp"
    state = samfast.report(fused).others[name]
    as_exact_as(fused, stock, maps())
    return state.partition(", which ")[2]


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_forwards_of_other_programs(forward):
    kind, reason = FORWARDS[forward]
    stock = MODELS[kind]().eval()
    layer = layer_of(stock, kind)
    layer.__class__ = named(getattr(cobot, KINDS[kind]), forward)
    layer.relation, layer.CP = True, torch.ones(1, 16)
    assert left_alone(stock, kind).startswith(reason)


class Conjugate(cobot.QuaternionLinear):
    """Its head is another's."""

    def forward(self, x):
        i, j, k = -self.i_weight, -self.j_weight, -self.k_weight
        return torch.matmul(x, hamilton(self.r_weight, i, j, k))


class Wrong(torch.autograd.Function):
    """Its backward drops what it should give."""

    @staticmethod
    def forward(ctx, x, r, i, j, k):
        ctx.save_for_backward(r, i, j, k)
        return torch.matmul(x, hamilton(r, i, j, k))

    @staticmethod
    def backward(ctx, dy):
        r, i, j, k = ctx.saved_tensors
        return torch.matmul(dy, hamilton(r, i, j, k).t()), None, None, None, None


class Untrained(cobot.QuaternionLinear):
    def forward(self, x):
        return Wrong.apply(x, self.r_weight, self.i_weight, self.j_weight, self.k_weight)


SWITCH = [True]


class Switched(cobot.QuaternionLinear):
    def forward(self, x):
        i, j, k = self.i_weight, self.j_weight, self.k_weight
        return torch.matmul(x, hamilton(self.r_weight, i, j, k)) if SWITCH[0] else x


OTHER_HEADS = {
    Conjugate: _RUN,
    Untrained: "is not what its name says: its forward gives another gradient of FacT_d1.r_weight",
    Switched: f"{_CODE}Switched uses SWITCH, a list",
}


@pytest.mark.parametrize("head", OTHER_HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("kind", ["lora", "related"])
def test_heads_of_other_programs(kind, head):
    assert left_alone(MODELS[kind](head).eval(), kind).startswith(OTHER_HEADS[head])


def normed_late(model):
    model.blocks[0].mlp.adapter_layernorm_option = "out"
    return "has adapter_layernorm_option='out', not 'in'"


def of_another_activation(model):
    model.blocks[0].mlp.non_linear_func = nn.GELU()
    return "has torch's GELU as non_linear_func, not nn.ReLU"


def without_a_bias(model):
    model.blocks[0].mlp.up_proj.bias = None
    return "has a up_proj without a bias"


def with_a_child(model):
    model.blocks[0].mlp.gate = nn.Linear(2, 2)
    return "has a child gate, which would be left out"


def over_a_layer(model):
    model.blocks[0].mlp.mlp = nn.Linear(WIDTH, WIDTH)
    return "has a mlp without a child lin1"


def of_another_index(model):
    model.blocks[0].mlp.idx = DEPTH - 1 + 0.0
    return "has the index 1.0, while FacT_p has 2 slices"


def of_other_slices(model):
    layer = model.blocks[0].mlp
    layer.FacT_c = nn.Parameter(torch.ones(1, 16, DEPTH + 1))
    return "has a FacT_c of shape (1, 16, 3), not (1, 16, 2)"


def of_a_biased_head(model):
    layer = model.blocks[0].mlp
    layer.FacT_d1 = cobot.QuaternionLinear(16, 16, bias=True)
    return "has a FacT_d1 that has a parameter bias, which would be left out"


def of_a_head_with_a_tensor(model):
    layer = model.blocks[0].mlp
    del layer.FacT_d1._parameters["bias"]
    layer.FacT_d1.bias = torch.ones(16)
    return "has a FacT_d1 with a bias that is not a parameter"


BUILDS = {
    of_a_head_with_a_tensor: related,
    normed_late: adapters,
    of_another_activation: adapters,
    without_a_bias: adapters,
    with_a_child: adapters,
    over_a_layer: adapters,
    of_another_index: related,
    of_other_slices: related,
    of_a_biased_head: related,
}


@pytest.mark.parametrize("change", BUILDS, ids=lambda change: change.__name__)
def test_builds_of_other_programs(change):
    stock = BUILDS[change]().eval()
    reason = change(stock)
    fused = fused_of(stock)
    state = samfast.report(fused).others["blocks.0.mlp"]
    assert state.partition(", which ")[2] == reason
    assert type(fused.blocks[0].mlp) is type(stock.blocks[0].mlp)
    if change in (of_another_index, of_other_slices):  # which fail
        return
    assert torch.equal(fused.blocks[0].mlp(maps()), stock.blocks[0].mlp(maps()))


def hooked_head(layer):
    layer.FacT_d1.register_forward_hook(lambda module, args, y: 2 * y)
    return "has hooks or a forward of its own on FacT_d1"


def hooked_factor(layer):
    part = layer.linear_a_q if hasattr(layer, "linear_a_q") else layer.down_proj
    part.register_forward_hook(lambda module, args, y: 2 * y)
    name = "linear_a_q" if hasattr(layer, "linear_a_q") else "down_proj"
    return f"has hooks or a forward of its own on {name}"


def another_dtype(layer):
    layer.gamma.data = layer.gamma.data.double()
    return "has layers of float32 and float64"


@pytest.mark.parametrize("change", [hooked_head, hooked_factor, another_dtype])
@pytest.mark.parametrize("kind", ["lora", "related"])
def test_what_is_changed_after_fuse_runs_the_owners_forward(kind, change):
    stock = MODELS[kind]().eval()
    fused = fused_of(stock)
    for model in (stock, fused):
        reason = change(layer_of(model, kind))
    name = "blocks.0.attn.qkv" if kind == "lora" else "blocks.0.mlp"
    state = samfast.report(fused).others[name]
    assert state == f"not fused: cobot_twins' {KINDS[kind]} {reason}"
    if change is another_dtype:
        for model in (stock, fused):
            with pytest.raises(RuntimeError, match="dtype"):
                layer_of(model, kind)(maps())
        return
    as_exact_as(fused, stock, maps())


def test_a_patched_head_runs_as_it_is_patched(monkeypatch):
    fused, stock = samfast.fuse(related().eval()), related().eval()
    forward = cobot.QuaternionLinear.forward
    monkeypatch.setattr(cobot.QuaternionLinear, "forward", lambda self, x: 2 * forward(self, x))
    as_exact_as(fused, stock, maps())
    state = samfast.report(fused).others["blocks.0.mlp"]
    assert state.startswith("not fused: cobot_twins' Adapter_relation is not what its name says")


def test_a_patched_dropout_runs_as_it_is_patched(monkeypatch):
    """Which the owner calls as nn.functional.dropout."""
    stock = adapters(dropout=0.5).blocks[0].mlp
    fused = fused_of(stock)
    monkeypatch.setattr(nn.functional, "dropout", lambda z, p, training: 5 * z)
    assert fused.block_problem().endswith("torch.nn.functional.dropout, which was replaced")
    assert torch.equal(fused(maps()), stock(maps()))


def test_calls_of_the_owner_are_named(tmp_path):
    model = samfast.fuse(related())
    owners = "the adapters of this Trunk are cobot_twins'; "
    with pytest.raises(ValueError, match=owners + r"save model.state_dict\(\), as SAM-COBOT's"):
        samfast.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=owners + "SAM-COBOT has no call that folds them"):
        samfast.merge(model)
    with pytest.raises(ValueError, match=owners + "they add nothing to the loss"):
        samfast.aux_loss(model)
    with pytest.raises(ValueError, match="already has an adapter, cobot_twins' Adapter_relation"):
        samfast.attach(model, samfast.Lora(), train=())
    found = samfast.report(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found.adapter_parameters == sum(model.get_parameter(n).numel() for n in names)


def test_samfasts_own_adapters_are_no_one_elses():
    """Their base class has the name of one of SAM-COBOT's, and their parts have too."""
    from samfast.modules import AdaptFormerMlp

    model = trunk()
    model.blocks[0].mlp = AdaptFormerMlp.from_mlp(model.blocks[0].mlp)
    assert samfast.report(model).others == {}


def test_a_narrow_model():
    stock, x = lora().bfloat16(), maps(dtype=torch.bfloat16)
    fused = fused_of(stock)
    assert block_calls(fused, x) == DEPTH
    as_exact_as(fused, stock, x, torch.bfloat16)


def test_a_narrow_adapter():
    stock = related(dropout=0.0).blocks[0].mlp.bfloat16()
    x, fused, double = maps(dtype=torch.bfloat16), fused_of(stock), copy.deepcopy(stock).double()
    all_within_budget(fused(x), lambda: stock(x), lambda: double(x.double()), torch.bfloat16)
