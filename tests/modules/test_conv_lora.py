# SPDX-License-Identifier: Apache-2.0
"""ConvLoraLinear: start, inputs, noise, options, and the published names of its state."""

import copy
import math
import pickle

import pytest
import torch
from budgets import within_budget
from literal_conv_lora import LiteralConvLora, translated
from safetensors.torch import load, save
from stock_runs import by_reference
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from samfast.functional import conv_experts
from samfast.kernels.conv_experts.conv_lora import part_backend
from samfast.modules import ConvLoraLinear

EXPERTS = 4
PUBLISHED = {
    "weight",
    "bias",
    "lora_A",
    "lora_B",
    *(f"lora_moe_gating.{name}" for name in ("w_gate", "w_noise", "mean", "std")),
    *(f"lora_moe_experts.{i}.0.{kind}" for i in range(EXPERTS) for kind in ("weight", "bias")),
}


def filled(module, seed=3):
    """The module with random tensors where it starts with zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in ("lora_B", "expert_bias", "w_gate", "w_noise"):
            parameter = module.get_parameter(name)
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(12, 18)


@pytest.fixture
def module(linear):
    return filled(ConvLoraLinear.from_linear(linear, experts=EXPERTS))


def test_starts_as_the_linear_and_shares_it(linear):
    module = ConvLoraLinear.from_linear(linear.eval())
    assert module.weight is linear.weight and module.bias is linear.bias and not module.training
    x = torch.randn(2, 3, 5, 12)
    assert torch.equal(module(x), linear(x))
    assert torch.equal(module.train()(x), linear(x))
    assert module.experts == 8 and module.ratios == tuple(range(1, 9)) and module.scaling == 32 / 3
    assert not any(p.any() for p in (module.lora_B, module.expert_bias, module.w_gate))
    assert module.lora_A.abs().max() <= 12**-0.5 and module.lora_A.std() > 0.4 * 12**-0.5


def test_experts_start_as_convolutions_do():
    for depthwise, fan_in in ((False, 27), (True, 9)):
        weight = ConvLoraLinear(12, 18, experts=64, depthwise=depthwise).expert_weight
        assert weight.shape == (64, 3, fan_in // 9, 3, 3)
        bound = 1 / math.sqrt(fan_in)  # of nn.Conv2d
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.flatten(1).std(1).sub(bound / math.sqrt(3)).abs().max() < 0.3 * bound
        assert not torch.equal(weight[0], weight[1])


def test_parameters_are_wide_and_counted():
    module = ConvLoraLinear(1280, 3840, bias=False, device="meta", dtype=torch.bfloat16)
    own = dict(module.adapter_parameters())
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert sum(p.numel() for p in own.values()) == 16_080
    assert all(p.is_meta for p in module.parameters()) and module.bias is None
    wide = ConvLoraLinear(8, 9, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    filled(wide).reset_parameters()
    assert not wide.lora_B.any() and wide.lora_A.any()


def test_token_lists_are_maps(module):
    module.eval()
    x = torch.randn(2, 5, 5, 12)
    tokens = x.flatten(1, 2)
    assert torch.equal(module(tokens), module(x).flatten(1, 2))
    assert torch.equal(module(x, (5, 5)), module(x))
    wide = torch.randn(2, 2, 12, 12)
    expected = module(wide)
    assert torch.equal(module(wide.flatten(1, 2), (2, 12)).view_as(expected), expected)
    assert not torch.equal(module(wide.flatten(1, 2), (12, 2)).view_as(expected), expected)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((2, 24, 12), None, "expected a square map, got 24 tokens .*; pass size"),
        ((2, 24, 12), (4, 5), "x has 24 tokens, which do not fill a map of 4 × 5"),
        ((2, 24, 12), (-4, -6), "do not fill a map of -4 × -6"),
        ((2, 4, 6, 12), (6, 4), r"x has shape \(2, 4, 6, 12\), whose maps are not \(6, 4\)"),
        ((24, 12), None, r"x has shape \(24, 12\), but must be"),
        ((2, 4, 6, 13), None, "weight takes 12 inputs"),
    ],
)
def test_inputs_that_are_no_maps(module, shape, size, message):
    with pytest.raises(ValueError, match=message):
        module(torch.randn(shape), size)


def test_noise_is_one_draw_of_the_global_stream(module):
    x = torch.randn(3, 4, 4, 12)
    torch.manual_seed(7)
    y, aux = module(x, return_aux=True)
    after = torch.rand(1)
    torch.manual_seed(7)
    noise = torch.randn(3, EXPERTS)
    assert torch.equal(torch.rand(1), after)
    given = module(x, noise=noise, return_aux=True)
    assert torch.equal(given[0], y) and torch.equal(given[1], aux)
    drawn = module(x, generator=torch.Generator().manual_seed(7), return_aux=True)
    assert torch.equal(drawn[0], y) and torch.equal(drawn[1], aux)
    assert not torch.equal(module(x, noise=-noise, return_aux=True)[1], aux)
    module.eval()
    assert torch.equal(module(x), module(x))
    with pytest.raises(ValueError, match="the gate uses noise only in training"):
        module(x, noise=noise)


def test_dropout_acts_in_training_only(linear):
    module = filled(ConvLoraLinear.from_linear(linear, dropout=0.5))
    x, noise = torch.randn(3, 4, 4, 12), torch.randn(3, 8)
    torch.manual_seed(5)
    first = module(x, noise=noise)
    assert not torch.equal(module(x, noise=noise), first)
    torch.manual_seed(5)
    assert torch.equal(module(x, noise=noise), first)
    module.eval()
    assert torch.equal(module(x), module(x))


def test_a_forced_choice_is_kept(module):
    x = torch.randn(EXPERTS, 4, 4, 12)
    index = torch.arange(EXPERTS)

    def literal(m, x):
        h = F.linear(x, m.lora_A)
        z = conv_experts(h, m.expert_weight, m.expert_bias, index, m.ratios)
        return F.linear(x, m.weight, m.bias) + m.scaling * F.linear(z, m.lora_B)

    wide = copy.deepcopy(module).double()
    stock, exact = by_reference(literal, module, x), by_reference(literal, wide, x.double())
    within_budget(module.eval()(x, expert_index=index), stock, exact, torch.float32)
    with pytest.raises(ValueError, match="expert_index has 4, but there are experts 0 to 3"):
        module(x, expert_index=index + 1)
    with pytest.raises(ValueError, match=r"must be int64 of shape \(4,\)"):
        module(x, expert_index=index[:2])


def test_broken_samples_stay_alone(module):
    """NaN and Inf in one sample of x or dy reach no other sample's y or dx."""
    noise, index = torch.randn(3, EXPERTS), torch.tensor([3, 0, 1])

    def run(x, dy):
        x = x.detach().requires_grad_()
        y = module(x, noise=noise, expert_index=index)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    tensors = {"x": torch.randn(3, 4, 5, 12), "dy": torch.randn(3, 4, 5, 18)}
    expected = run(**tensors)
    for bad in (float("nan"), float("inf")):
        for where in ("x", "dy"):
            broken = {name: t.clone() for name, t in tensors.items()}
            broken[where][1, 2, 2, 3] = bad
            for value, whole in zip(run(**broken), expected, strict=True):
                assert torch.equal(value[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_one_nan_reaches_what_it_reaches_in_the_literal_layer(linear, where, backend, monkeypatch):
    """Pixels of y and of x's gradient, with the gate's choice and with a forced one."""
    monkeypatch.setenv("SAMFAST_BACKEND", backend)
    ours = filled(ConvLoraLinear.from_linear(linear, experts=4, ratios=(1, 2, 4, 6))).eval()
    literal = LiteralConvLora(ours).eval()
    for index in (None, *(torch.tensor([n, 0]) for n in range(4))):
        for y, x in ((0, 0), (3, 4), (7, 10)):
            tensors = {"x": torch.randn(2, 8, 11, 12), "dy": torch.randn(2, 8, 11, 18)}
            tensors[where][0, y, x, 5] = float("nan")
            found = []
            for module in (ours, literal):
                leaf = tensors["x"].clone().requires_grad_()
                out = module(leaf, expert_index=index)
                out = out if module is ours else out[0]
                (dx,) = torch.autograd.grad(out, leaf, tensors["dy"])
                found.append([out.isfinite(), dx.isfinite()])
            assert all(torch.equal(*pair) for pair in zip(*found, strict=True)), (index, y, x)


def test_one_expert_has_no_balancing_loss(linear):
    module = filled(ConvLoraLinear.from_linear(linear, rank=1, experts=1, ratios=(3,)))
    y, aux = module(torch.randn(2, 4, 4, 12), return_aux=True)
    assert aux == 0 and y.isfinite().all()


@pytest.mark.parametrize("options", [{"top_k": 2}, {"formula": "paper"}], ids=str)
def test_other_formulas_run_on_the_reference(linear, options, monkeypatch):
    monkeypatch.delenv("SAMFAST_BACKEND", raising=False)
    module = filled(ConvLoraLinear.from_linear(linear, experts=EXPERTS, **options))
    assert set(module.backends().values()) == {"reference"}
    x, noise = torch.randn(3, 4, 4, 12), torch.randn(3, EXPERTS)
    y, aux = module(x, noise=noise, return_aux=True)
    (y.sum() + aux).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    usual = ConvLoraLinear.from_linear(linear, experts=EXPERTS)
    usual.load_state_dict(module.state_dict())
    assert not torch.equal(usual(x, noise=noise), y)
    monkeypatch.setenv("SAMFAST_BACKEND", "torch")
    assert set(usual.backends().values()) == {"torch"}
    assert "runs on the reference only" in module.backends()["conv_experts"]


def test_state_dict_has_the_published_names(module):
    state = module.state_dict()
    assert set(state) == PUBLISHED
    for name, parameter in module.named_parameters():
        assert torch.equal(translated(state)[name], parameter)
    assert not any(value.requires_grad for value in state.values())
    state["lora_moe_experts.2.0.weight"].fill_(5.0)  # a state dict is the module's own memory
    assert (module.expert_weight[2] == 5.0).all()
    assert set(load(save(state))) == PUBLISHED
    kept = module.state_dict(keep_vars=True)
    assert kept["lora_A"] is module.lora_A and kept["lora_moe_gating.w_gate"] is module.w_gate
    assert kept["lora_moe_experts.1.0.bias"].requires_grad
    model = nn.Sequential(nn.ModuleDict({"qkv": module}))
    assert set(model.state_dict()) == {f"0.qkv.{name}" for name in PUBLISHED}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loads_its_own_and_published_state(module, device, assign):
    model = nn.Sequential(module)
    state = copy.deepcopy(model.state_dict())
    other = nn.Sequential(ConvLoraLinear(12, 18, experts=EXPERTS, device=device))
    other[0].lora_A.requires_grad_(False)
    result = other.load_state_dict(state, strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    if device == "meta" and not assign:
        assert other[0].expert_weight.is_meta
        return
    for (name, value), loaded in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, loaded), name
        assert loaded.requires_grad == (name != "0.lora_A") and isinstance(loaded, nn.Parameter)
    x = torch.randn(3, 4, 4, 12)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_missing_and_unexpected_keys_have_the_published_names(module):
    model = nn.ModuleDict({"qkv": module})
    state = copy.deepcopy(model.state_dict())
    for gone in ("lora_moe_experts.2.0.weight", "lora_moe_gating.w_noise", "lora_moe_gating.std"):
        del state[f"qkv.{gone}"]
    state |= {"qkv.expert_weight": module.expert_weight.detach(), "qkv.lora_C": torch.zeros(1)}
    state["qkv.lora_moe_experts.4.0.weight"] = torch.zeros(3, 3, 3, 3)
    other = nn.ModuleDict({"qkv": filled(ConvLoraLinear(12, 18, experts=EXPERTS), seed=8)})
    before = copy.deepcopy(other.state_dict())
    result = other.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {
        "qkv.lora_moe_experts.2.0.weight",
        "qkv.lora_moe_gating.w_noise",
        "qkv.lora_moe_gating.std",
    }
    assert set(result.unexpected_keys) == {
        "qkv.expert_weight",
        "qkv.lora_C",
        "qkv.lora_moe_experts.4.0.weight",
    }
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name] if name in result.missing_keys else state[name])
    with pytest.raises(RuntimeError, match=r"Missing key.*qkv.lora_moe_experts.2.0.weight"):
        other.load_state_dict(state)


def test_the_parameters_names_are_no_names_of_the_state(module):
    other = filled(ConvLoraLinear(12, 18, experts=EXPERTS), seed=8)
    before = copy.deepcopy(other.state_dict())
    result = other.load_state_dict(dict(module.named_parameters()), strict=False)
    packed = {"expert_weight", "expert_bias", "w_gate", "w_noise"}
    assert set(result.unexpected_keys) == packed
    assert set(result.missing_keys) == {name for name in PUBLISHED if "moe" in name}
    for name in result.missing_keys:
        assert torch.equal(other.state_dict()[name], before[name])


def test_half_of_the_experts_cannot_make_a_meta_module_real(module):
    state = module.state_dict()
    del state["lora_moe_experts.2.0.weight"]
    other = ConvLoraLinear(12, 18, experts=EXPERTS, device="meta")
    result = other.load_state_dict(state, strict=False, assign=True)
    assert result.missing_keys == ["lora_moe_experts.2.0.weight"]
    assert other.expert_weight.is_meta and not other.expert_bias.is_meta


def test_state_of_other_sizes_is_refused(module):
    state = module.state_dict()
    other = ConvLoraLinear(12, 18, experts=EXPERTS, depthwise=True)
    sentence = (
        r"lora_moe_experts.0.0.weight has shape \(3, 3, 3, 3\), but here it is \(3, 1, 3, 3\)"
    )
    with pytest.raises(RuntimeError, match=sentence) as raised:
        other.load_state_dict(state)
    assert "Missing" not in str(raised.value)
    state["lora_moe_gating.mean"] = torch.ones(1)
    with pytest.raises(
        RuntimeError, match=r"lora_moe_gating.mean is \[1.0\], but the gate's noise"
    ):
        module.load_state_dict(state)


def test_copies_are_equal_after_a_forward(module):
    x = torch.randn(3, 4, 4, 12)
    module(x)
    expected = module.eval()(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected)
        assert twin.latest_loss() is not module.latest_loss()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 13}, "rank 13 is above 12"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": -1}, "alpha is -1"),
        ({"experts": 0}, "experts is 0; it must be a whole number of at least 1"),
        ({"experts": 2, "ratios": (1, 2, 3)}, r"ratios is \(1, 2, 3\); it must have one entry"),
        ({"experts": 2, "ratios": (1, 0)}, "ratios has 0; each must be a whole number"),
        ({"depthwise": 1}, "depthwise is 1; it must be True or False"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"top_k": 9}, "top_k is 9; it must be a whole number from 1 to 8"),
        ({"formula": "book"}, "formula is 'book'; it must be one of code, paper"),
    ],
)
def test_bad_options_end_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        ConvLoraLinear(12, 18, **options)


def test_from_linear_takes_a_plain_linear_only(module):
    with pytest.raises(TypeError, match="got ConvLoraLinear"):
        ConvLoraLinear.from_linear(module)


def test_repr_names_the_options(linear, module):
    assert repr(module).endswith("bias=True, rank=3, alpha=32, experts=4)")
    other = ConvLoraLinear.from_linear(
        linear, 2, 4, 2, ratios=(3, 5), depthwise=True, dropout=0.1, top_k=2, formula="paper"
    )
    text = "experts=2, ratios=(3, 5), depthwise=True, dropout=0.1, top_k=2, formula=paper)"
    assert repr(other).endswith(text)


def test_noise_is_a_constant_of_any_width(module):
    x, noise = torch.randn(3, 4, 4, 12), torch.randn(3, EXPERTS)
    expected = module(x, noise=noise, return_aux=True)
    for given in (noise.double(), noise.clone().requires_grad_()):
        y, aux = module(x, noise=given, return_aux=True)
        assert torch.equal(y, expected[0]) and torch.equal(aux, expected[1])
        (y.sum() + aux).backward()
    assert given.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_generator_under_a_checkpoint_is_refused(module, reentrant):
    """It has moved on when the forward runs again; the global stream is put back."""
    x, generator = torch.randn(3, 4, 4, 12, requires_grad=True), torch.Generator().manual_seed(1)
    y = checkpoint(lambda t: module(t, generator=generator), x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="its generator has moved on; draw the noise before"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((2, 0, 3, 12), None, r"x has shape \(2, 0, 3, 12\), maps without pixels"),
        ((2, 0, 12), None, "maps without pixels"),
        ((2, 25, 12), (5, 5, 1), r"size is \(5, 5, 1\); it must be two whole numbers"),
        ((2, 25, 12), (5.0, 5.0), r"size is \(5.0, 5.0\); it must be two whole numbers"),
    ],
)
def test_sizes_that_are_none(module, shape, size, message):
    with pytest.raises(ValueError, match=message):
        module(torch.randn(shape), size)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}])
def test_a_forced_choice_out_of_range(options):
    layer = ConvLoraLinear(12, 18, experts=3, **options).eval()
    with pytest.raises(ValueError, match="expert_index has 9, but there are experts 0 to 2"):
        layer(torch.randn(2, 4, 4, 12), expert_index=torch.tensor([0, 9]))


def test_cuda_stands_for_the_experts_alone():
    """Triton runs what is beside them, as far as a layer is asked what it would take."""
    assert part_backend("conv_experts", "cuda") == "cuda"
    assert part_backend("lora_linear", "cuda") == part_backend("expert_gate", "cuda") == "triton"
    assert (
        part_backend("lora_linear", "cpu") == "cpu"
        and part_backend("expert_gate", "cpu") == "torch"
    )


def test_ratios_have_a_limit():
    with pytest.raises(ValueError, match="ratios has 5000; each must be a whole number from 1 to"):
        ConvLoraLinear(12, 18, experts=1, ratios=(5000,))
