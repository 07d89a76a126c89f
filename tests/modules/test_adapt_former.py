# SPDX-License-Identifier: Apache-2.0
"""AdaptFormerMlp alone and inside a fused block, against the literal modules."""

import copy
import re

import pytest
import torch
from adapt_former_layers import LiteralAdaptFormer, adapted_mlp, fill, sided, with_side
from black_box import Subject
from budgets import all_within_budget, keep
from draws import DEVICE
from sam_layers import block, check_all_dtypes, subject
from segment_anything.modeling.common import MLPBlock
from stock_runs import by_reference
from torch import nn

import samfast
from benchmarks import saved
from samfast.counters import count, saved_bytes
from samfast.kernels._common.budget import Budget
from samfast.models import build_sam
from samfast.modules import AdaptFormerMlp, ConvLoraLinear, LoraLinear, SamBlock

pytestmark = pytest.mark.usefixtures("same_noise")
MODES = ("fast", "balanced", "minimal")
WINDOW, WHOLE = (4, 2, 6, 7), (0, 2, 5, 6)  # side, batch, height, width
LINEARS = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")


def alone():
    ours = adapted_mlp()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 7, 40, generator=generator, dtype=torch.float64).to(DEVICE)
    return Subject(ours, LiteralAdaptFormer(ours), x)


def lora(kind=LoraLinear, places=LINEARS, **options):
    """Adapters on the block's layers, beside the branch."""

    def change(stock):
        torch.manual_seed(3)
        for place in places:
            holder, _, leaf = place.rpartition(".")
            layer = kind.from_linear(stock.get_submodule(place), **options)
            for parameter in dict(layer.adapter_parameters()).values():
                if not parameter.any():  # as adapters start
                    nn.init.normal_(parameter, std=0.2)
            setattr(stock.get_submodule(holder), leaf, layer)

    return change


def budget_of(run, model, dtype):
    """What the results of run(model, dtype) leave, by the reference backend."""
    stock, exact = (by_reference(run, model, kind) for kind in (dtype, torch.float64))
    return Budget(stock, exact, dtype)


def test_alone():
    check_all_dtypes(alone())


def test_narrow_base_and_float32_branch():
    """As attached with base_dtype: products are rounded as the literal narrow module's."""
    layers = alone()
    module = layers.module("ours", torch.bfloat16)
    for (_, parameter), (_, wide) in zip(
        module.adapter_parameters(), layers.ours.adapter_parameters(), strict=True
    ):
        parameter.data = wide.data.float()
    ours = layers.run("ours", torch.bfloat16, module=module)
    for name, value in ours.items():
        narrow = name in ("y", "dx") or name.startswith("lin")
        assert value.dtype == (torch.bfloat16 if narrow else torch.float32), name
    keep(budget_of(layers.run, "stock", torch.bfloat16), ours)


def test_init_names_and_sizes():
    module = AdaptFormerMlp(12, 20, nn.ReLU, bottleneck=3, dropout=0.2, dtype=torch.bfloat16)
    assert type(module.act) is nn.ReLU and module.lin1.weight.dtype == torch.bfloat16
    own = dict(module.adapter_parameters())
    assert {name: tuple(p.shape) for name, p in own.items()} == {
        "adapter_layer_norm_before.weight": (12,),
        "adapter_layer_norm_before.bias": (12,),
        "down_proj.weight": (3, 12),
        "down_proj.bias": (3,),
        "up_proj.weight": (12, 3),
        "up_proj.bias": (12,),
    }
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert bool((own["adapter_layer_norm_before.weight"] == 1).all())
    bound = 12**-0.5  # of Kaiming's with a = √5
    assert 0.5 * bound < own["down_proj.weight"].abs().max() <= bound
    for name in ("adapter_layer_norm_before.bias", "down_proj.bias", "up_proj.weight"):
        assert not own[name].any(), name
    assert "bottleneck=3, dropout=0.2" in str(module)
    assert (AdaptFormerMlp(8, 8).bottleneck, AdaptFormerMlp(8, 8).dropout) == (16, 0.1)
    assert AdaptFormerMlp(8, 8, device="meta").down_proj.weight.is_meta


def test_from_mlp_takes_the_mlp_over():
    mlp = MLPBlock(12, 20).eval()
    module, x = AdaptFormerMlp.from_mlp(mlp, 3, 0.4), torch.randn(2, 5, 12)
    assert module.lin1 is mlp.lin1 and module.lin2 is mlp.lin2 and module.act is mlp.act
    assert not module.training and not module.down_proj.training
    assert set(mlp.state_dict()) < set(module.state_dict())
    for training in (True, False):
        assert torch.equal(module.train(training)(x), mlp(x))
    wide = AdaptFormerMlp.from_mlp(MLPBlock(12, 20).double())
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_dropout_in_training_only():
    module, x = fill(AdaptFormerMlp(12, 20, dropout=0.5)), torch.randn(2, 5, 12)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda: AdaptFormerMlp(8, 8, bottleneck=0), ValueError, "bottleneck is 0; it must be a"),
        (lambda: AdaptFormerMlp(8, 8, bottleneck=2.0), ValueError, "bottleneck is 2.0"),
        (lambda: AdaptFormerMlp(8, 8, dropout=1), ValueError, "dropout is 1; it must be at least"),
        (lambda: AdaptFormerMlp.from_mlp(nn.Linear(3, 3)), TypeError, "MLPBlock, got Linear"),
        (
            lambda: AdaptFormerMlp.from_mlp(AdaptFormerMlp(8, 8)),
            TypeError,
            "expected segment_anything's MLPBlock, got AdaptFormerMlp",
        ),
    ],
)
def test_bad_options(make, kind, sentence):
    with pytest.raises(kind, match=sentence):
        make()


def test_an_mlp_of_another_width_is_refused():
    mlp = MLPBlock(8, 12)
    mlp.lin2 = nn.Linear(12, 9)
    with pytest.raises(
        ValueError,
        match="expected an MLP with as many outputs as inputs, got 8 inputs and 9 outputs",
    ):
        AdaptFormerMlp.from_mlp(mlp)


def test_three_launches_forward_and_five_back(monkeypatch):
    """Beside those of the MLP; and no sync."""
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    module = fill(AdaptFormerMlp(48, 8, bottleneck=5, dropout=0.3)).to(DEVICE)
    if module.backends()["adapt_former"] != "triton":
        pytest.skip(module.backends()["adapt_former"])
    x = torch.randn(40, 48, device=DEVICE, requires_grad=True)
    leaves = [x, *(p for _, p in module.adapter_parameters())]
    dy = torch.randn(40, 48, device=DEVICE)
    base = count(lambda: torch.autograd.grad(MLPBlock.forward(module, x), x, dy))
    counts = count(lambda: torch.autograd.grad(module(x), leaves, dy))
    more = counts.launches - base.launches
    assert more == {
        "randint": 1,
        "low_kernel": 1,
        "add": 2,  # the bias to the MLP's result; two gradients of x, autograd's
        "up_kernel": 1,
        "sum": 1,
        "up_backward_kernel": 1,
        "reduce_kernel": 1,
        "low_backward_kernel": 1,
        "fold_kernel": 1,
    }
    assert counts.total_syncs == 0


@pytest.mark.parametrize("name", ["adapter_layer_norm_before", "down_proj", "up_proj", "lin1"])
def test_hooks(name):
    """They are called, may change the result, and put a fused block in parts, with a sentence."""
    for layers in (alone(), sided(*WINDOW)):
        for model in (layers.ours, layers.stock):
            part = model.get_submodule(name if hasattr(model, "lin1") else f"mlp.{name}")
            part.register_forward_hook(lambda module, given, y: 2 * y)
        check_all_dtypes(layers, low=())
        if isinstance(layers.ours, SamBlock):
            problem = layers.ours.block_problem()
            assert problem == f"{name} has hooks or a forward of its own"
        elif name != "lin1":
            assert layers.ours.backends() == {}


def test_another_part_in_its_place():
    layers = sided(*WINDOW)
    for model in (layers.ours, layers.stock):
        model.mlp.adapter_layer_norm_before = nn.Identity()
    assert re.search("norm_before is torch's Identity", layers.ours.block_problem())
    check_all_dtypes(layers, low=(torch.bfloat16,))


def test_another_activation_puts_the_block_in_parts():
    layers = sided(*WINDOW)
    for model in (layers.ours, layers.stock):
        model.mlp.act = nn.ReLU()
    assert "not the exact GELU" in layers.ours.block_problem()
    check_all_dtypes(layers, low=(torch.bfloat16,))


@pytest.mark.parametrize("sizes", [WINDOW, WHOLE], ids=["windows", "map"])
@pytest.mark.parametrize(
    ("change", "memory"),
    [(None, "fast"), (None, "minimal"), (lora(rank=3), "fast"),
     (lora(rank=2), "balanced"), (lora(places=LINEARS[3:], rank=1), "minimal")],
    ids=["alone", "alone-minimal", "lora", "lora-balanced", "lora on lin2"],
)  # fmt: skip
def test_in_a_block(sizes, change, memory):
    """All is trained."""
    layers = sided(*sizes, change=change, memory=memory)
    assert layers.ours.block_problem() is None
    check_all_dtypes(layers)


@pytest.mark.slow_on_cpu("auto")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "trained",
    [
        ("adapter_layer_norm_before", "_proj."),
        ("up_proj.bias",),
        ("up_proj.weight",),
        ("adapter_layer_norm_before.bias",),
        ("down_proj.weight", "lin2.bias"),
        ("norm1.", "down_proj.bias"),
        ("lin1.bias",),
    ],
    ids="+".join,
)
def test_only_some_are_trained(trained, backend, monkeypatch):
    """With and without a gradient for x, which decides how far a backward goes."""
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    layers = sided(*WINDOW, trained=trained)
    assert layers.ours.block_problem() is None
    check_all_dtypes(layers, low=(torch.bfloat16,))
    results = {}
    for which in ("ours", "stock"):
        model = layers.module(which, torch.float32)
        model(layers.x.float()).backward(layers.dy.float())
        results[which] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    budget = budget_of(layers.run, "stock", torch.float32)
    assert set(results["ours"]) == set(results["stock"]) == set(budget.exact) - {"y", "dx"}
    keep(budget, results["ours"], some=True)


def training_run(model, dtype, seed=11):
    model = copy.deepcopy(model).to(DEVICE, dtype).train()
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 2, 6, 7, 32, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    torch.manual_seed(seed)
    y = model(x.requires_grad_())
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *named.values()], dy, materialize_grads=True)
    return dict(zip(["y", "dx", *named], [y.detach(), *grads], strict=True))


@pytest.mark.parametrize("sizes", [WINDOW, (0, 2, 6, 7)], ids=["windows", "map"])
@pytest.mark.parametrize("kind", [LoraLinear, ConvLoraLinear])
def test_memory_modes_and_parts_draw_the_same(kind, sizes, monkeypatch):
    """Bits are equal in every mode with dropout on; module by module the masks are the same."""
    places = LINEARS if kind is LoraLinear else LINEARS[:1]
    stock = with_side(block(sizes[0], (6, 7)), dropout=0.4)
    lora(kind, places, rank=2, dropout=0.3)(stock)
    for dtype in (torch.float32, torch.bfloat16):
        results = {}
        for memory in MODES:
            fused = SamBlock.from_block(copy.deepcopy(stock), memory)
            assert fused.block_problem() is None
            results[memory] = training_run(fused, dtype)
        for memory in MODES[1:]:
            for name, value in results["fast"].items():
                assert torch.equal(value, results[memory][name]), (memory, name)
    ours = training_run(SamBlock.from_block(copy.deepcopy(stock)), torch.float32)
    monkeypatch.setattr(SamBlock, "block_problem", lambda self: "asked for")
    in_parts = SamBlock.from_block(copy.deepcopy(stock))
    budget = budget_of(training_run, in_parts, torch.float32)
    keep(budget, ours)
    keep(budget, training_run(in_parts, torch.float32))


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("value", [1e3, 5.0, 0.0], ids=["far from zero", "constant", "zeros"])
def test_hard_rows(value, memory):
    layers = sided(*WINDOW, memory=memory)
    layers.x = value + 0.1 * layers.x if value == 1e3 else torch.full_like(layers.x, value)
    for dtype in (torch.float32, torch.bfloat16):
        x = layers.x.to(dtype)
        stock = by_reference(layers.run, "stock", dtype, x=x)
        exact = by_reference(layers.run, "stock", torch.float64, x=x.double())
        all_within_budget(layers.run("ours", dtype, x=x), stock, exact, dtype)


@pytest.mark.parametrize("memory", MODES)
def test_one_sample_that_is_not_a_number(memory):
    layers = sided(*WINDOW, memory=memory)
    x = layers.x.float().clone()
    x[1] = float("nan")
    ours = layers.run("ours", torch.float32, x=x)
    stock = layers.run("stock", torch.float32, x=x)
    for name, value in ours.items():
        assert torch.equal(value.isfinite(), stock[name].isfinite()), name
    assert ours["y"][0].isfinite().all() and ours["y"][1].isnan().all()


@pytest.mark.slow_on_cpu("balanced-torch.float32")
@pytest.mark.parametrize(
    ("memory", "dtype"),
    [("fast", torch.bfloat16), ("balanced", torch.float32), ("minimal", torch.bfloat16)],
    ids=str,
)
def test_saved_bytes_of_a_block(memory, dtype):
    """The bottleneck more than without: V per token, nothing in the last mode."""
    kept = {}
    for bottleneck in (0, 6):
        stock = block(4, (6, 7))
        if bottleneck:
            with_side(stock, bottleneck, dropout=0.2)
        fused = SamBlock.from_block(stock, memory).to(dtype).train()
        for _, parameter in fused.mlp.adapter_parameters() if bottleneck else ():
            parameter.data = parameter.data.float()
        x = torch.randn(2, 6, 7, 32, device=DEVICE).to(dtype).requires_grad_()
        known = [x, *fused.parameters()]
        found = saved_bytes(lambda fused=fused, x=x: fused(x), known)
        assert found.hooks == found.living
        kept[bottleneck] = found.hooks
    tokens, seed = 2 * 6 * 7, 8
    more = kept[6] - kept[0]
    assert more == seed + (0 if memory == "minimal" else tokens * 6 * dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_alone(dtype):
    """x, which lin1 may keep too, and the bottleneck."""
    module = fill(AdaptFormerMlp(48, 8, bottleneck=5, dropout=0.3)).to(DEVICE)
    module.requires_grad_(False)
    base = module.to(dtype)
    for _, parameter in module.adapter_parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    x = torch.randn(40, 48, device=DEVICE).to(dtype)
    found = saved_bytes(lambda: base(x), [*module.parameters()])
    assert found.hooks == x.nbytes + 40 * 5 * dtype.itemsize
    assert found.living == found.hooks - x.nbytes


def test_shapes_that_do_not_chain_are_refused_by_the_block():
    layers = sided(*WINDOW)
    layers.ours.mlp.up_proj.weight = nn.Parameter(torch.zeros(32, 5).double().to(DEVICE))
    with pytest.raises(ValueError, match=r"up has shape \(32, 5\), but 32 features and a bott"):
        layers.ours(layers.x)
    layers = subject(block(4), 2, 6, 7)
    with_side(layers.ours).mlp.down_proj.to("meta")
    with pytest.raises(ValueError, match="down of side is on meta but x is on"):
        layers.ours(layers.x)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize(
    "memory", ["fast", *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])]
)
def test_saved_bytes_of_an_encoder(memory):
    """ViT-B at 1024², counted without memory: 1.10 of the floor and the bottlenecks' own."""
    dtype, bottleneck = torch.bfloat16, 16
    sam = build_sam("vit_b", random_init=True, device="meta")
    samfast.attach(sam, samfast.AdaptFormer(bottleneck=bottleneck), base_dtype=dtype)
    encoder = samfast.fuse(sam.image_encoder, memory=memory).train()
    images = torch.empty(1, 3, 1024, 1024, dtype=dtype, device="meta")
    known = [images, *encoder.parameters(), *encoder.buffers()]
    closed = ("samfast::window_relpos_attention_forward",)
    found = saved_bytes(lambda: encoder(images), known, closed)
    assert found.living == found.hooks
    own = 0 if memory == "minimal" else len(encoder.blocks) * 4096 * bottleneck * dtype.itemsize
    least = saved.floor(encoder, memory, dtype) + own
    assert found.hooks <= 1.10 * least
