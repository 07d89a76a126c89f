# SPDX-License-Identifier: Apache-2.0
"""micro-sam's AttentionLoRA, MLPLoRA and AdaptFormer: whole blocks, blocks in parts, left alone."""

import copy
import pickle

import black_box
import literal_wrappers as wrappers
import pytest
import torch
from black_box import Subject
from budgets import all_within_budget
from peft_models import DEPTH, block_calls, maps, run
from torch import nn
from wrapped_models import as_exact_as, branches, micro, moved, photographs, sam

import samfast
from samfast.adapters.stand_in import whose

UPDATED = [("q",), ("q", "v"), ("q", "k", "v"), ("q", "v", "mlp"), ("mlp",)]
QUICK = ("lora-autocast", "lora-copies", "branch-autocast", "branch-copies", "branch-checkpointing")
IN_PARTS = "fused in parts: mlp adds its input to its result, which a fused block does not"


def fused_and_stock(stock):
    return samfast.fuse(copy.deepcopy(stock)), stock


@pytest.mark.slow_on_cpu(but=QUICK)
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", ["lora", "branch"])
def test_black_box(kind, check):
    """A block with windows; the branch alone, for its block runs in parts."""
    model = (micro("q", "v", "mlp") if kind == "lora" else branches()).double()
    stock = model.blocks[0] if kind == "lora" else model.blocks[0].mlp
    ours = samfast.fuse(copy.deepcopy(stock))
    assert ours.block_problem() is None
    check(Subject(ours, stock, maps(3, torch.float64)))


@pytest.mark.parametrize("updated", UPDATED, ids=lambda names: "".join(names))
def test_every_gradient(updated):
    fused, stock = fused_and_stock(micro(*updated))
    assert block_calls(fused, maps()) == DEPTH
    assert [*fused.state_dict()] == [*stock.state_dict()]
    kinds = {f"fused: literal_wrappers' {kind}" for kind in ("AttentionLoRA", "MLPLoRA")}
    found = {*samfast.report(fused).others.values()}
    assert found == kinds if "mlp" in updated else found < kinds
    as_exact_as(fused, stock, maps())


def test_an_mlp_on_its_own():
    fused, stock = fused_and_stock(micro("mlp").blocks[0].mlp)
    assert fused.block_problem() is None and fused.backends()
    as_exact_as(fused, stock, maps())


def test_alpha_is_read_at_every_forward():
    """Not divided by the rank; a Parameter is left to its owner."""
    fused, stock = fused_and_stock(micro("q", "v"))
    for model in (fused, stock):
        for block in model.blocks:
            block.attn.qkv.alpha = 2.5
    assert block_calls(fused, maps()) == DEPTH
    as_exact_as(fused, stock, maps())
    for model in (fused, stock):
        layer = model.blocks[0].attn.qkv
        del layer.alpha
        layer.alpha = nn.Parameter(torch.tensor(0.5))
    assert block_calls(fused, maps()) == DEPTH - 1
    state = samfast.report(fused).others["blocks.0.attn.qkv"]
    assert state.endswith("AttentionLoRA has a parameter alpha, which would be left out")
    as_exact_as(fused, stock, maps())


@pytest.mark.parametrize("alpha", ["learnable_scalar", 0.5])
def test_a_branch_runs_in_parts(alpha):
    fused, stock = fused_and_stock(branches(alpha=alpha))
    found = samfast.report(fused)
    assert {*found.others.values()} == {"fused: literal_wrappers' AdaptFormer"}
    assert {*found.blocks.values()} == {IN_PARTS} and {*found.attention.values()} == {"fused"}
    names = [n for n, p in fused.named_parameters() if p.requires_grad]
    count = sum(fused.get_parameter(name).numel() for name in names)
    assert found.adapter_parameters == count
    as_exact_as(fused, stock, maps())


def test_dtypes_of_a_branch_are_the_owners():
    """alpha is no scalar to torch, so autocast does not narrow its product."""
    fused, stock = fused_and_stock(branches().blocks[0].mlp)
    for x in (maps(), maps(dtype=torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(x).dtype == stock(x).dtype == torch.float32
    for model in (fused, stock):
        model.bfloat16().alpha.data = model.alpha.data.float()
    assert fused.block_problem() == "has an alpha of float32 and an up_proj of bfloat16"
    x = maps(dtype=torch.bfloat16)
    assert torch.equal(fused(x), stock(x))


def test_a_branch_saves_no_map_for_alpha():
    """The owner's keeps up's result, D elements a token, for the gradient of alpha."""

    def saved(module):
        counted = {}

        def keep(tensor):
            counted[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = maps().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(x)
        return sum(counted.values()), y

    stock = branches().blocks[0].mlp
    fused = samfast.fuse(copy.deepcopy(stock))
    small = sum(p.untyped_storage().nbytes() for p in fused.up_proj.parameters())
    assert saved(fused)[0] <= saved(stock)[0] - maps().untyped_storage().nbytes() + small


def test_dropout_of_a_branch_is_the_owners():
    """The same random numbers, in training only."""
    fused, stock = fused_and_stock(branches(dropout=0.5))
    ours, theirs = fused.blocks[0].mlp, stock.blocks[0].mlp
    double, x = copy.deepcopy(theirs).double(), maps()

    def seeded(module, x):
        torch.manual_seed(3)
        return module(x)

    assert not torch.equal(ours(x), ours(x))
    all_within_budget(
        seeded(ours, x), lambda: seeded(theirs, x), lambda: seeded_like(double, theirs, x),
        torch.float32,
    )  # fmt: skip
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def seeded_like(double, single, x):
    """In float64, with what dropout leaves in float32."""
    kept = []
    hook = single.dropout_layer.register_forward_hook(
        lambda module, args, y: kept.append((y != 0) | (args[0] == 0))
    )
    torch.manual_seed(3)
    single(x)
    hook.remove()
    hook = double.dropout_layer.register_forward_hook(
        lambda module, args, y: torch.where(kept[0], args[0] / (1 - module.p), 0.0)
    )
    y = double(x.double())
    hook.remove()
    return y


def test_a_whole_model_as_micro_sam_makes_it(tmp_path):
    """It trains and saves ``sam``; names of the wrapper come twice."""
    stock = moved(wrappers.PEFT_Sam(sam(), 2, update_matrices=("q", "v", "mlp"))).eval()
    samfast.fuse(stock)
    found = samfast.report(stock)
    assert {*found.blocks.values()} == {"fused"} and len(found.others) == 2 * DEPTH
    assert block_calls(stock.sam.image_encoder, photographs()) == DEPTH
    state = stock.sam.state_dict()
    assert "image_encoder.blocks.0.attn.qkv.w_a_linear_q.weight" in state
    torch.save({"model_state": state}, tmp_path / "best.pt")
    plain = wrappers.PEFT_Sam(sam(), 2, update_matrices=("q", "v", "mlp"))
    plain.sam.load_state_dict(torch.load(tmp_path / "best.pt")["model_state"])
    assert all(torch.equal(state[n], value) for n, value in plain.sam.state_dict().items())
    twin = pickle.loads(pickle.dumps(stock))
    assert twin.sam.image_encoder.blocks[0].attn.qkv is twin.peft_blocks[0].block.attn.qkv


@pytest.mark.parametrize("make", [lambda: micro("q", "v", "mlp"), branches], ids=["lora", "branch"])
def test_unfuse_gives_the_same_bits(make):
    stock, x = make(), maps()
    fused = samfast.unfuse(samfast.fuse(copy.deepcopy(stock)))
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    for name, value in run(stock, x).items():
        assert torch.equal(run(fused, x)[name], value), name


class MLPLoRA(wrappers.MLPLoRA):
    def forward(self, x):
        h = self.mlp_layer.lin1(x) + 0.5 * self.w_b_linear_1(self.w_a_linear_1(x))
        h = self.activation(h)
        return self.mlp_layer.lin2(h) + 0.5 * self.w_b_linear_2(self.w_a_linear_2(h))


class AdaptFormer(wrappers.AdaptFormer):
    """Without the residual, as its paper has it."""

    def forward(self, x):
        z = self.up_proj(self.non_linear_func(self.down_proj(x))) * self.alpha
        return z + self.mlp_proj(x)


def halved():
    block = micro("q").blocks[0]
    block.mlp = MLPLoRA(3, block.mlp)
    return block, "is not what its name says: its forward gives another output"


def of_the_paper():
    block = branches().blocks[0]
    block.mlp = block.mlp.mlp_proj
    AdaptFormer(3, block, projection_size=8)
    return block, "is not what its name says: its forward gives another output"


class Late(wrappers.AdaptFormer):
    """Its dropout is behind the branch."""

    __qualname__ = "AdaptFormer"

    def forward(self, x):
        z = self.up_proj(self.non_linear_func(self.down_proj(x)))
        return self.dropout_layer(z) * self.alpha + x + self.mlp_proj(x)


Late.__name__ = "AdaptFormer"


def dropped_late():
    block = branches().blocks[0]
    block.mlp = block.mlp.mlp_proj
    Late(3, block, projection_size=8, dropout=0.5)
    return block.eval(), "is not what its name says: its forward gives another output"


def normed():
    block = branches().blocks[0]
    block.mlp.layer_norm = nn.LayerNorm(32)
    return block, "has a child layer_norm, which would be left out"


def of_many_alphas():
    block = branches().blocks[0]
    block.mlp.alpha = nn.Parameter(torch.ones(32))
    return block, "has an alpha of shape (32,)"


def over_a_layer():
    block = branches().blocks[0]
    block.mlp.mlp_proj = nn.Linear(32, 32)
    return block, "has a mlp_proj without a child lin1"


LOOK_ALIKES = (halved, of_the_paper, dropped_late, normed, of_many_alphas, over_a_layer)


@pytest.mark.parametrize("make", LOOK_ALIKES)
def test_look_alikes(make):
    stock, reason = make()
    moved(stock)
    fused = samfast.fuse(copy.deepcopy(stock))
    assert type(fused.mlp) is type(stock.mlp)
    package, kind = type(stock.mlp).__module__, type(stock.mlp).__name__
    state = samfast.report(fused).others["mlp"]
    assert state.startswith(f"not fused: {whose(package)} {kind}, which {reason}")
    assert block_calls(fused, maps()) == 0
    as_exact_as(fused, stock, maps())


def hooked_up(mlp):
    mlp.up_proj.register_forward_hook(lambda module, args, y: 2 * y)


def hooked_down(mlp):
    mlp.down_proj.register_forward_hook(lambda module, args, y: 2 * y)


@pytest.mark.parametrize("hook", [hooked_up, hooked_down])
def test_hooks_inside_a_branch_act(hook):
    fused, stock = fused_and_stock(branches())
    for model in (fused, stock):
        hook(model.blocks[0].mlp)
    as_exact_as(fused, stock, maps())


def test_hooks_inside_the_lora_of_an_mlp_act():
    fused, stock = fused_and_stock(micro("q", "v", "mlp"))
    for model in (fused, stock):
        model.blocks[0].mlp.mlp_layer.lin1.register_forward_hook(lambda module, args, y: 2 * y)
    assert samfast.report(fused).blocks["blocks.0"] == (
        "fused in parts: mlp has hooks or a forward of its own on lin1"
    )
    assert block_calls(fused, maps()) == DEPTH - 1
    as_exact_as(fused, stock, maps())


def test_what_samfast_does_not_know_is_named(monkeypatch):
    class FacTSurgery(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.qkv_proj, self.FacTu = block.attn.qkv, nn.Linear(32, 2, bias=False)
            block.attn.qkv = self

        def forward(self, x):
            return self.qkv_proj(x)

    FacTSurgery.__module__, FacTSurgery.__qualname__ = "micro_sam.models.peft_sam", "FacTSurgery"
    model = micro("q")
    FacTSurgery(model.blocks[1])
    samfast.fuse(model)
    state = "not fused: micro_sam's FacTSurgery, which samfast does not know"
    assert samfast.report(model).others["blocks.1.attn.qkv"] == state


def test_calls_of_the_owner_are_named(tmp_path):
    model = samfast.fuse(micro("q", "v"))
    owners = "the adapters of this Trunk are literal_wrappers'; "
    with pytest.raises(ValueError, match=owners + r"save model.state_dict\(\)"):
        samfast.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=owners + "micro_sam has no call that folds them"):
        samfast.merge(model)
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv already has an adapter"):
        samfast.attach(model, samfast.Lora(), train=())
