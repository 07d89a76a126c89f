# SPDX-License-Identifier: Apache-2.0
"""SamBlock against segment_anything's own, with adapters on any of its layers."""

import copy
import re

import pytest
import torch
from budgets import all_within_budget, keep
from draws import DEVICE
from sam_layers import block, check_all_dtypes, subject
from stock_runs import by_reference
from torch import nn

import samfast
from samfast.kernels._common.budget import Budget
from samfast.modules import ConvLoraLinear, LoraLinear, QkvLora, SamBlock

pytestmark = pytest.mark.usefixtures("same_noise")
LINEARS = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
MODES = ("fast", "balanced", "minimal")
WINDOW, WHOLE = (4, 2, 6, 7), (0, 2, 5, 6)  # side, batch, height, width
SIZES = pytest.mark.parametrize("sizes", [WINDOW, WHOLE], ids=["windows", "map"])


def with_adapters(stock, kind, places, **options):
    """The block with an adapter of that kind, filled, in each of the places."""
    torch.manual_seed(3)
    for place in places:
        holder, _, leaf = place.rpartition(".")
        layer = kind.from_linear(stock.get_submodule(place), **options)
        for name, parameter in layer.adapter_parameters():
            if not parameter.any():  # as adapters start
                nn.init.normal_(parameter, std=0.2 if "gate" not in name else 0.5)
        setattr(stock.get_submodule(holder), leaf, layer)
    return stock


def one_node(layers):
    assert layers.ours.block_problem() is None
    return layers


@SIZES
@pytest.mark.parametrize(
    ("kind", "places", "options"),
    [
        (LoraLinear, LINEARS[:1], {"rank": 3, "alpha": 6}),
        (LoraLinear, LINEARS, {"rank": 2}),
        (LoraLinear, LINEARS[2:], {"rank": 2, "alpha": 5}),
        (QkvLora, LINEARS[:1], {"rank": 2}),
        (QkvLora, LINEARS[:1], {"rank": 1, "slices": ("k",)}),
    ],
    ids=["qkv", "all", "mlp", "q, v", "k"],
)
def test_lora(kind, places, options, sizes):
    """All is trained: adapters, weights, biases, norms and tables."""
    window, *size = sizes
    stock = with_adapters(block(window, size[1:]), kind, places, **options)
    check_all_dtypes(one_node(subject(stock, *size)))


@pytest.mark.slow_on_cpu("torch")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_lora_as_attached(backend, monkeypatch):
    """The base frozen, and what some train beside adapters: biases, norms, tables."""
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    for trained in ((), ("bias",), ("norm1.", "norm2."), ("rel_pos_",), ("qkv.bias", "norm1.b")):
        stock = with_adapters(block(4), LoraLinear, LINEARS, rank=2)
        for name, parameter in stock.named_parameters():
            wanted = "lora_" in name or any(part in name for part in trained)
            parameter.requires_grad_(wanted)
        layers = one_node(subject(stock, 2, 6, 7))
        check_all_dtypes(layers, low=(torch.bfloat16,))
        y = layers.ours(layers.x)
        y.backward(layers.dy)
        for name, parameter in layers.ours.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


def seeded_run(model, dtype, seed=11):
    """{"y", "aux", "dx", every trained parameter}: y · dy and the balancing loss, same noise."""
    model = copy.deepcopy(model).to(DEVICE, dtype).train()
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 2, 6, 7, 32, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    torch.manual_seed(seed)
    y = model(x.requires_grad_())
    aux = samfast.aux_loss(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((y * dy).sum() + 100 * aux, [x, *named.values()])
    return dict(zip(["y", "aux", "dx", *named], [y.detach(), aux.detach(), *grads], strict=True))


def budget_of(run, model, dtype):
    """What the results of run(model, dtype) leave, by the reference backend."""
    stock, exact = (by_reference(run, model, kind) for kind in (dtype, torch.float64))
    return Budget(stock, exact, dtype)


def conv_lora(window, places, **options):
    stock = block(window, (6, 7))
    options = {"rank": 3, "experts": 3, "alpha": 3, **options}
    stock = with_adapters(stock.requires_grad_(False), ConvLoraLinear, places, **options)
    with torch.no_grad():  # the noise decides, so that rounding does not
        for place in places:
            stock.get_submodule(place).w_noise.mul_(4)
    return stock


@pytest.mark.parametrize(
    ("window", "places"),
    [
        (4, LINEARS[:1]),
        (0, LINEARS),
        (4, LINEARS[2:]),
        (4, (LINEARS[0], *LINEARS[2:])),
        (0, LINEARS[1:2]),
    ],
    ids=["qkv in windows", "all of a map", "mlp", "all but proj", "proj of a map"],
)
def test_conv_lora(window, places):
    """The stock block with the same layers: values, gradients, and the balancing loss of each."""
    stock = conv_lora(window, places)
    fused = SamBlock.from_block(copy.deepcopy(stock))
    assert fused.block_problem() is None
    for dtype in (torch.float64, torch.float32):
        ours, budget = seeded_run(fused, dtype), budget_of(seeded_run, stock, dtype)
        assert set(ours) == set(budget.exact)
        keep(budget, ours)


def test_conv_lora_on_proj_of_windows_runs_in_parts():
    """Its experts see windows after the attention, which the one node never cuts out."""
    stock = conv_lora(4, LINEARS[1:2])
    fused = SamBlock.from_block(copy.deepcopy(stock))
    assert "may look at whole windows" in fused.block_problem()
    keep(budget_of(seeded_run, stock, torch.float32), seeded_run(fused, torch.float32))


@SIZES
@pytest.mark.parametrize("method", ["lora", "conv-lora"])
def test_memory_modes_and_parts_draw_the_same(method, sizes, monkeypatch):
    """Noise and dropout are the same in every mode, whose bits are equal, and module by module."""
    if method == "lora":
        stock = with_adapters(block(sizes[0], (6, 7)), LoraLinear, LINEARS, rank=2, dropout=0.4)
    else:
        stock = conv_lora(sizes[0], (LINEARS[0], *LINEARS[2:]), dropout=0.4)
    results = {}
    for dtype in (torch.float32, torch.float64):
        for memory in MODES:
            fused = SamBlock.from_block(copy.deepcopy(stock), memory)
            assert fused.block_problem() is None
            if method == "lora":  # aux_loss of a block that has none is zero
                assert not samfast.aux_loss(fused)
                results[memory, dtype] = lora_run(fused, dtype)
            else:
                results[memory, dtype] = seeded_run(fused, dtype)
    for memory in MODES[1:]:
        for dtype in (torch.float32, torch.float64):
            for name, value in results["fast", dtype].items():
                assert torch.equal(value, results[memory, dtype][name]), (memory, name)
    run = lora_run if method == "lora" else seeded_run
    monkeypatch.setattr(SamBlock, "block_problem", lambda self: "asked for")
    in_parts = SamBlock.from_block(copy.deepcopy(stock))
    budget = budget_of(run, in_parts, torch.float32)
    keep(budget, results["fast", torch.float32])
    keep(budget, run(in_parts, torch.float32))


def lora_run(model, dtype, seed=11):
    model = copy.deepcopy(model).to(DEVICE, dtype).train()
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 2, 6, 7, 32, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    torch.manual_seed(seed)
    y = model(x.requires_grad_())
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *named.values()], dy)
    return dict(zip(["y", "dx", *named], [y.detach(), *grads], strict=True))


@SIZES
def test_dropout_differs_from_call_to_call(sizes):
    window, *size = sizes
    stock = with_adapters(block(window, size[1:]), LoraLinear, LINEARS, rank=2, dropout=0.4)
    fused, x = SamBlock.from_block(stock).train(), torch.randn(*size, 32, dtype=torch.float64)
    x = x.to(DEVICE)
    assert not torch.equal(fused(x), fused(x))
    fused.eval()
    assert torch.equal(fused(x), fused(x))


@SIZES
@pytest.mark.parametrize("kind", [LoraLinear, QkvLora])
def test_merged(kind, sizes):
    """In eval a merged adapter is a linear layer of the node; in training it refuses."""
    window, *size = sizes
    stock = with_adapters(block(window, size[1:]), kind, LINEARS[:1], rank=2).eval()
    layers = one_node(subject(stock, *size))
    for model in (layers.ours, layers.stock):
        model.attn.qkv.merge()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" not in name)

    def run(which, dtype):
        model = copy.deepcopy(getattr(layers, which))
        model.attn.qkv.unmerge()
        model = model.to(dtype)
        model.attn.qkv.merge()
        return layers.run(which, dtype, module=model)

    for dtype in (torch.float32, torch.bfloat16):
        stock, exact = (by_reference(run, "stock", t) for t in (dtype, torch.float64))
        all_within_budget(run("ours", dtype), stock, exact, dtype)
    with torch.no_grad():
        assert layers.ours.train().block_problem() is None
        layers.ours(layers.x)
    assert layers.ours.block_problem() == "qkv has its adapter merged, which cannot be trained"
    with pytest.raises(RuntimeError, match="a merged adapter cannot be trained"):
        layers.ours(layers.x)


@pytest.mark.parametrize(
    ("window", "size"),
    [(7, (3, 2, 3)), (3, (4, 1, 1)), (14, (1, 14, 14)), (0, (2, 1, 9)), (2, (2, 2, 5))],
    ids=str,
)
def test_odd_sizes_with_adapters(window, size):
    """Windows larger than the map, single tokens, no padding, lines, padding on one side."""
    stock = with_adapters(block(window, (5, 4)), LoraLinear, LINEARS, rank=2)
    layers = one_node(subject(stock, *size))
    if size[1:] == (1, 1):  # the padding alone has another place, so the tables' gradients are few
        check_all_dtypes(layers, low=(torch.bfloat16,))
    else:
        check_all_dtypes(layers)


def test_no_bias_on_qkv():
    """Padding is zeros then; with Conv-LoRA, its update alone."""
    stock = with_adapters(block(4, qkv_bias=False), LoraLinear, LINEARS[:1], rank=2)
    check_all_dtypes(one_node(subject(stock, 2, 6, 7)))
    stock = conv_lora(4, LINEARS[:1])
    stock.attn.qkv.bias = None
    fused = SamBlock.from_block(copy.deepcopy(stock))
    keep(budget_of(seeded_run, stock, torch.float32), seeded_run(fused, torch.float32))


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("value", [1e3, 5.0, 0.0], ids=["far from zero", "constant", "zeros"])
def test_hard_rows(value, memory):
    """x of mean 1e3 and deviation 0.1, and rows that have no variance at all."""
    layers = subject(block(4), 2, 6, 7)
    layers.ours.memory = memory
    layers.x = value + 0.1 * layers.x if value == 1e3 else torch.full_like(layers.x, value)
    for dtype in (torch.float32, torch.bfloat16):
        x = layers.x.to(dtype)
        stock = by_reference(layers.run, "stock", dtype, x=x)
        exact = by_reference(layers.run, "stock", torch.float64, x=x.double())
        all_within_budget(layers.run("ours", dtype, x=x), stock, exact, dtype)


@pytest.mark.parametrize("memory", MODES)
@SIZES
def test_one_sample_that_is_not_a_number(sizes, memory):
    window, *size = sizes
    layers = subject(block(window, size[1:]), *size)
    layers.ours.memory = memory
    x = layers.x.float().clone()
    x[1] = float("nan")
    ours = layers.run("ours", torch.float32, x=x)
    stock = layers.run("stock", torch.float32, x=x)
    for name, value in ours.items():
        assert torch.equal(value.isfinite(), stock[name].isfinite()), name
    assert ours["y"][0].isfinite().all() and ours["y"][1].isnan().all()


@pytest.mark.parametrize("name", [n for n, _ in block(4).named_modules() if n])
def test_hooks_on_any_submodule(name):
    """They are called, with what the stock block shows them, and may change the result."""
    layers = subject(block(4), 2, 6, 7)
    shown = {}
    for which, model in (("ours", layers.ours), ("stock", layers.stock)):
        module = model.get_submodule(name)

        def hook(module, given, y, which=which):
            shown.setdefault(which, []).append((given[0].shape, y.shape))
            return 2 * y

        module.register_forward_hook(hook)
    problem = layers.ours.block_problem()
    assert "hooks or a forward of its own" in problem
    check_all_dtypes(layers, low=())
    assert set(shown["ours"]) == set(shown["stock"])


def test_hooks_on_the_block_itself():
    """It stays one node."""
    layers, called = subject(block(4), 2, 6, 7), []
    layers.ours.register_forward_hook(lambda *_: called.append("forward"))
    layers.ours.register_full_backward_hook(lambda *_: called.append("backward"))
    assert layers.ours.block_problem() is None
    y = layers.ours(layers.x.requires_grad_())
    y.sum().backward()
    assert called == ["forward", "backward"]


def replace(**modules):
    """Both blocks share what is put in."""

    def change(fused):
        for name, module in modules.items():
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
            holder, _, leaf = name.replace("_in_", ".").rpartition(".")
            setattr(fused.get_submodule(holder), leaf, module.double().to(DEVICE))

    return change


class Patched(nn.Linear):
    """A layer of the user's own."""


def patched_forward(fused):
    fused.mlp.lin1.forward = fused.mlp.lin1.forward


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (replace(norm1=nn.RMSNorm(32)), "norm1 is torch's RMSNorm"),
        (replace(norm2=nn.LayerNorm((7, 32))), r"not a LayerNorm over the features with weight"),
        (replace(norm2=nn.LayerNorm(32, bias=False)), "over the features with weight and bias"),
        (replace(mlp_in_act=nn.GELU("tanh")), "approximate='tanh'.* not the exact GELU"),
        (replace(mlp_in_act=nn.ReLU()), r"the activation is ReLU\(\), not the exact GELU"),
        (replace(mlp=nn.Sequential(nn.Linear(32, 32))), "mlp is torch's Sequential"),
        (replace(mlp_in_lin2=Patched(64, 32)), "lin2 is test_sam_block's Patched, which does not"),
        (replace(attn_in_qkv=Patched(32, 96)), "qkv is test_sam_block's Patched, which may look"),
        (patched_forward, "lin1 has hooks or a forward of its own"),
        (lambda b: setattr(b.attn, "backend", "reference"), "attn has the reference backend"),
        (lambda b: setattr(b.attn, "use_rel_pos", False), "it has no relative positions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_stands_against_one_node(change, sentence):
    layers = subject(block(4), 2, 6, 7)
    for model in (layers.ours, layers.stock):
        torch.manual_seed(4)
        change(model)
        for table in (model.attn.rel_pos_h, model.attn.rel_pos_w):
            table.requires_grad_(model.attn.use_rel_pos)
    assert re.search(sentence, layers.ours.block_problem()), layers.ours.block_problem()
    assert layers.ours.backends() == {}
    check_all_dtypes(layers, low=())


def test_the_reference_backend_runs_in_parts(monkeypatch):
    layers = subject(block(4), 2, 6, 7)
    monkeypatch.setenv("SAMFAST_BACKEND", "reference")
    assert layers.ours.block_problem() == "the reference backend runs its submodules one by one"
    check_all_dtypes(layers, low=(torch.bfloat16,))


@SIZES
def test_in_parts_as_in_one(sizes, monkeypatch):
    """The submodules one by one, with the attention fused."""
    window, *size = sizes
    monkeypatch.setattr(SamBlock, "block_problem", lambda self: "asked for")
    check_all_dtypes(subject(block(window, size[1:]), *size))


BAD = {
    "features": lambda x: x[..., :31],
    "integers": lambda x: x.int(),
    "dtype": lambda x: x.half(),
    "complex": lambda x: x.to(torch.complex64),
}


@pytest.mark.parametrize(
    ("change", "autocast"),
    [
        pytest.param(change, autocast, id=f"{'autocast' if autocast else ''}-{name}")
        for autocast in (False, True)
        for name, change in BAD.items()
        if not (autocast and name == "dtype")  # float16 is welcome there
    ],
)
def test_bad_input_as_in_the_stock_block(change, autocast):
    """What it refuses is refused in its words."""
    layers, outcome = subject(block(4), 2, 6, 7), {}
    for which, model in (("ours", layers.ours), ("stock", layers.stock)):
        context = torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast)
        with pytest.raises((RuntimeError, ValueError, IndexError)) as caught, context:
            model(change(layers.x))
        outcome[which] = (caught.type, str(caught.value))
    assert outcome["ours"] == outcome["stock"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda x: x.flatten(1, 2),
            r"has shape \(2, 42, 96\), but 2 heads need \(B, H, W, 3 · D\)",
        ),
        (lambda x: x[0], r"has shape \(6, 7, 96\), but 2 heads need \(B, H, W, 3 · D\)"),
        (lambda x: x[:, :0], r"has shape \(2, 0, 7, 96\), but H and W must be"),
    ],
    ids=["tokens", "one image", "no lines"],
)
def test_what_is_no_map(change, sentence):
    layers = subject(block(4), 2, 6, 7)
    with pytest.raises(ValueError, match=sentence):
        layers.ours(change(layers.x))


def test_bad_memory():
    with pytest.raises(ValueError, match="memory is 'none'; it must be one of fast, balanced, min"):
        SamBlock.from_block(block(4), "none")
    fused = SamBlock.from_block(block(4), "balanced")
    assert fused.memory == "balanced" and "memory=balanced" in str(fused)
    with pytest.raises(TypeError, match="expected segment_anything's Block, got SamBlock"):
        SamBlock.from_block(fused)
