# SPDX-License-Identifier: Apache-2.0
"""RelPosAttention and SamBlock against segment_anything's own, values and every gradient."""

import copy

import pytest
import torch
from sam_layers import attention, block, check_all_dtypes, subject
from torch import nn

from samfast.modules import ConvLoraLinear, LoraLinear, QkvLora, RelPosAttention, SamBlock


@pytest.mark.slow_on_cpu("torch")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("height", "width", "tables"),
    [(14, 14, None), (9, 13, None), (6, 9, (14, 14)), (9, 4, (3, 5))],
    ids=lambda value: str(value).replace(", ", "x"),
)
def test_attention_of_maps(height, width, tables, backend, monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    check_all_dtypes(subject(attention(tables or (height, width)), 2, height, width))


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_attention_of_a_large_map(backend, monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    stock = attention((64, 64), dim=16, heads=1)
    check_all_dtypes(subject(stock, 1, 64, 64), low=(torch.bfloat16,))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("make", [lambda: attention((1, 1)), lambda: block(1)])
def test_one_token(make, backend, monkeypatch):
    """It has nothing but itself to attend to, so the tables' gradients are rounding alone."""
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    layers = subject(make(), 3, 1, 1)
    tables = [name for name, _ in layers.ours.named_parameters() if "rel_pos_" in name]
    check_all_dtypes(layers, beside=tables)
    result = layers.run("ours", torch.float32)
    values = max(result[name].abs().max() for name in result)
    for name in tables:
        assert result[name].abs().max() <= torch.finfo(torch.float32).eps * values


@pytest.mark.slow_on_cpu("torch")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("window", "batch", "height", "width"),
    [(14, 2, 14, 14), (4, 2, 9, 13), (7, 2, 14, 7), (7, 2, 3, 5), (3, 8, 1, 1), (0, 2, 9, 13)],
    ids=str,
)
def test_blocks(window, batch, height, width, backend, monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    check_all_dtypes(subject(block(window, (height, width)), batch, height, width))


def test_a_block_whose_tables_have_another_size_than_its_windows():
    stock = block(7)
    stock.window_size = 4
    check_all_dtypes(subject(stock, 2, 6, 7))


@pytest.mark.parametrize("options", [{"use_rel_pos": False}, {"qkv_bias": False}], ids=str)
def test_without_tables_and_without_bias(options):
    check_all_dtypes(subject(attention((5, 6), **options), 2, 5, 6))
    check_all_dtypes(subject(block(4, **options), 2, 5, 6))


def adapted(kind, options, stock):
    """The stock layer with an adapter on qkv, every tensor trained."""
    holder = stock.attn
    torch.manual_seed(3)
    layer = kind.from_linear(holder.qkv, **options)
    nn.init.normal_(layer.lora_B, std=0.2)
    holder.qkv = layer
    return stock


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LoraLinear, {"rank": 3, "alpha": 6}), (QkvLora, {"rank": 2}), (QkvLora, {"rank": 1})],
    ids=["lora", "q, v", "rank 1"],
)
def test_adapters_on_qkv(kind, options):
    stock = adapted(kind, options, block(4))
    with_adapter = subject(stock, 2, 6, 7)
    assert with_adapter.ours.window_order() is None
    check_all_dtypes(with_adapter)


@pytest.mark.parametrize("kind", [LoraLinear, QkvLora])
def test_a_row_of_zeros_gives_the_bias_under_dropout_too(kind):
    """What padding in image order stands on."""
    layer = adapted(kind, {"rank": 2, "dropout": 0.5}, block(4)).attn.qkv.train()
    rows = layer(torch.zeros(50, 32, dtype=torch.float64))
    assert torch.equal(rows, layer.bias.expand(50, -1))


@pytest.mark.parametrize(
    ("kind", "word"), [(LoraLinear, "token_wise"), (ConvLoraLinear, "window_wise")]
)
def test_a_derived_layer_speaks_for_itself(kind, word):
    """It may run another way, so what its base says of itself does not count."""
    derived = type("Derived", (kind,), {})
    saying = type("Saying", (kind,), {word: True})
    for subclass, problem in (
        (derived, "qkv is test_rel_pos_attention's Derived, which may"),
        (saying, "None"),
    ):
        stock = adapted(subclass, {"rank": 2}, block(4))
        layers = subject(stock, 1, 6, 7)
        assert str(layers.ours.window_order()).startswith(problem)


class OverWindows(nn.Linear):
    """A layer that looks at the whole map it is given."""

    def forward(self, x):
        return super().forward(x) + x.mean((1, 2), keepdim=True).repeat(1, 1, 1, 3)


def test_a_layer_that_may_look_at_whole_windows_is_given_windows():
    stock = block(4)
    stock.attn.qkv = OverWindows(32, 96).double().to(stock.attn.qkv.weight.device)
    layers = subject(stock, 2, 6, 7)
    assert layers.ours.window_order() == (
        "qkv is test_rel_pos_attention's OverWindows, which may look at whole windows"
    )
    check_all_dtypes(layers)


@pytest.mark.parametrize("place", ["qkv", "proj"])
def test_conv_lora(place):
    """In float32 and float64 alone: rounding may move the gate's choice."""
    stock = block(4)
    layer = ConvLoraLinear.from_linear(getattr(stock.attn, place), experts=3)
    for name in ("lora_B", "expert_bias", "w_gate"):
        nn.init.normal_(layer.get_parameter(name), std=0.2)
    setattr(stock.attn, place, layer)
    check_all_dtypes(subject(stock.eval(), 2, 6, 7), low=())


@pytest.mark.parametrize("place", ["attn", "attn.qkv", "attn.proj"])
def test_hooks_see_what_the_stock_block_shows_them(place):
    layers = subject(block(4), 2, 6, 7)
    seen = {}
    for which, model in (("ours", layers.ours), ("stock", layers.stock)):
        for name, module in model.named_modules():
            if name == place:
                module.register_forward_hook(
                    lambda module, x, y, which=which: seen.update({which: (x[0].shape, y.shape)})
                )
    check_all_dtypes(layers, low=())
    assert seen["ours"] == seen["stock"]
    assert "hooks" in layers.ours.window_order()


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_hooks_of_every_kind(register):
    fused, called = SamBlock.from_block(block(4)), []
    getattr(fused.attn, register)(lambda *given: called.append(given))
    assert fused.window_order() == "attn has hooks or a forward of its own"
    fused(torch.zeros(2, 6, 7, 32, dtype=torch.float64).requires_grad_()).sum().backward()
    ((_, shown, *_),) = called
    assert shown[0].shape == (8, 4, 4, 32)


def test_a_replaced_output_counts():
    layers = subject(block(4), 2, 6, 7)
    for model in (layers.ours, layers.stock):
        model.attn.register_forward_hook(lambda module, x, y: y.flip(1))
    check_all_dtypes(layers, low=())


@pytest.mark.parametrize("make", [lambda: attention((5, 6)), lambda: block(0), lambda: block(4)])
@pytest.mark.parametrize("use_rel_pos", [True, False])
def test_an_empty_batch(make, use_rel_pos):
    stock = make()
    for module in stock.modules():
        if hasattr(module, "use_rel_pos"):
            module.use_rel_pos = use_rel_pos
    ours = subject(stock, 1, 5, 6).ours
    x = torch.zeros(0, 5, 6, 32, dtype=torch.float64, device=next(ours.parameters()).device)
    y = ours(x.requires_grad_())
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 5, 6, 32)
    assert not any(p.grad.any() for p in ours.parameters() if p.grad is not None)


def test_sharing():
    """The same Parameters and submodules, the same state; what is replaced later is its own."""
    for stock, fuse in ((attention((4, 4)), RelPosAttention.from_attention),
                        (block(4), SamBlock.from_block)):  # fmt: skip
        stock.eval().note = "kept"
        ours = fuse(stock)
        mine, theirs = dict(ours.named_parameters()), dict(stock.named_parameters())
        assert list(mine) == list(theirs) and all(mine[name] is theirs[name] for name in mine)
        assert list(ours.state_dict()) == list(stock.state_dict())
        assert isinstance(ours, type(stock)) and not ours.training and ours.note == "kept"
        children = dict(stock.named_children())
        for name in children:
            setattr(ours, name, nn.Identity())
        assert dict(stock.named_children()) == children
        with pytest.raises(TypeError, match=f"expected segment_anything's {type(stock).__name__}"):
            fuse(ours)


def test_backend_of_one_layer(monkeypatch):
    layer = RelPosAttention.from_attention(attention((4, 4)).cpu())
    x = torch.randn(1, 4, 4, 32, dtype=torch.float64)
    assert "backend" not in str(layer) and layer.backends() == {"relpos_attention": "torch"}
    layer.backend = "nonsense"
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        layer(x)
    layer.backend = "cpu"  # float64 is not for the C++ code
    assert "torch.float64" in layer.backends()["relpos_attention"]
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run relpos_attention"):
        copy.deepcopy(layer)(x)
    assert "backend=cpu" in str(layer)
    layer.backend = "cuda"
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run relpos_attention"):
        layer(x)
    layer.backend = "triton"
    found = layer.backends()
    layer.backend = "auto"
    monkeypatch.setenv("SAMFAST_BACKEND", "cuda")  # asks all of a model, and Triton stands in here
    assert layer.backends() == found


@pytest.mark.parametrize("use_rel_pos", [True, False])
def test_a_scale_of_the_users_own(use_rel_pos):
    stock = attention((5, 6), use_rel_pos=use_rel_pos)
    stock.scale = 0.1
    check_all_dtypes(subject(stock, 2, 5, 6))
