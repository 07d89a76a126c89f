# SPDX-License-Identifier: Apache-2.0
"""PHMLinear and QuaternionLinear: their formulas, starts, and what from_linear finds."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from budgets import within_budget
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from samfast.counters import saved_bytes
from samfast.methods.kronecker import phm_layer
from samfast.methods.kronecker.phm_layer import hamilton_rules
from samfast.modules import PHMLinear, QuaternionLinear


def test_quaternions_multiply_as_hamilton_wrote():
    """A layer from four features to four is one quaternion times another."""
    layer = QuaternionLinear(4, 4, bias=False, dtype=torch.float64)
    a, b, c, d = 2.0, -1.0, 0.5, 3.0
    with torch.no_grad():
        for name, value in zip(layer.PARTS, (a, b, c, d), strict=True):
            layer.get_parameter(name).fill_(value)
    e, f, g, h = 1.0, 0.25, -2.0, 4.0
    y = layer(torch.tensor([e, f, g, h], dtype=torch.float64))
    assert y.tolist() == [
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    ]


def test_starts():
    """As COBOT's heads and as nn.Linear in variance."""
    torch.manual_seed(0)
    layer = QuaternionLinear(64, 128)
    assert not layer.r_weight.any() and set(layer.state_dict()) == {*layer.PARTS, "bias"}
    for name in layer.PARTS[1:]:
        part = layer.get_parameter(name)
        assert part.min() >= 0 and part.max() < 1 and part.mean().sub(0.5).abs() < 0.05
    for n in (2, 4, 16):
        layer, stock = PHMLinear(512, 256, n), nn.Linear(512, 256)
        assert 0.8 < layer.weight.std() / stock.weight.std() < 1.25
        assert sum(p.numel() for p in layer.parameters()) == n**3 + 256 * 512 // n + 256
        before = layer.weights.detach().clone()
        layer.reset_parameters()
        assert not torch.equal(layer.weights, before)
    assert PHMLinear(8, 8, 2, bias=False).bias is None
    assert PHMLinear(8, 8, 2, device="meta", dtype=torch.bfloat16).rules.is_meta
    assert PHMLinear(8, 8, 2, 1, device="meta").weight.is_meta
    assert QuaternionLinear(8, 8, device="meta", bias=False).weight.is_meta


@pytest.mark.parametrize("kind", [QuaternionLinear, PHMLinear])
def test_weight_is_what_the_layer_multiplies_by(kind):
    torch.manual_seed(0)
    layer = kind(12, 20, *([4] if kind is PHMLinear else [])).double()
    x = torch.randn(5, 12, dtype=torch.float64)

    def by_weight():
        return F.linear(x, layer.weight, layer.bias)

    within_budget(layer(x), by_weight, by_weight, torch.float64)
    assert layer.weight.shape == (20, 12)


def test_from_linear_of_a_layer_that_is_one():
    """What has the form already is found again."""
    torch.manual_seed(0)
    for make in (lambda: QuaternionLinear(8, 12), lambda: PHMLinear(8, 12, 2)):
        like = make().double()
        linear = nn.Linear(8, 12, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(like.weight)
        options = [2] if isinstance(like, PHMLinear) else []
        found = type(like).from_linear(linear.eval(), *options)
        assert found.bias is linear.bias and not found.training
        assert found.weight.dtype == torch.float64
        # a float64 product and a singular value decomposition of float64
        assert (found.weight - linear.weight).abs().max() <= 64 * torch.finfo(torch.float64).eps


def test_from_linear_is_the_nearest():
    """The gradient of the squared distance is zero there, and others are farther."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 24, dtype=torch.float64)
    for found in (QuaternionLinear.from_linear(linear), PHMLinear.from_linear(linear, 4)):
        own = [p for name, p in found.named_parameters() if name != "bias"]
        distance = (found.weight - linear.weight).square().sum()
        assert 0 < distance < linear.weight.square().sum()
        grads = torch.autograd.grad(distance, own)
        assert max(g.abs().max() for g in grads) <= 1000 * torch.finfo(torch.float64).eps
        for _ in range(5):
            other = copy.deepcopy(found)
            with torch.no_grad():
                for p in other.parameters():
                    p.add_(0.01 * torch.randn_like(p))
                assert (other.weight - linear.weight).square().sum() > distance
    exact = PHMLinear.from_linear(linear, 2)  # four cells have rank four at most; two are kept
    values = torch.linalg.svdvals(linear.weight.view(2, 12, 2, 8).transpose(1, 2).reshape(4, 96))
    distance = (exact.weight - linear.weight).square().sum()
    lost = values[2:].square().sum()
    assert (distance - lost).abs() <= 1000 * torch.finfo(torch.float64).eps * lost


def test_from_linear_with_more_terms_than_there_are():
    """A part of one element has as many terms as it has positions; the others are zeros."""
    torch.manual_seed(0)
    linear = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    found = PHMLinear.from_linear(linear, 4)
    assert found.bias is None and not found.weights[1:].any()
    assert (found.weight - linear.weight).abs().max() <= 64 * torch.finfo(torch.float64).eps


def test_from_linear_of_a_narrow_layer():
    linear = nn.Linear(8, 8, dtype=torch.bfloat16)
    for found in (QuaternionLinear.from_linear(linear), PHMLinear.from_linear(linear, 2)):
        assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
        assert found(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [QuaternionLinear, PHMLinear])
def test_what_is_saved_is_x(kind):
    """And of a quaternion layer the four parts side by side, which are no parameters."""
    layer = kind(16, 32, *([4] if kind is PHMLinear else []))
    x = torch.randn(100, 16)
    rules = layer.parts()[0]
    saved = saved_bytes(lambda: layer(x), [x, rules, *layer.parameters()])
    parts = 0 if kind is PHMLinear else 4 * 4 * 8 * 4
    assert (saved.hooks, saved.living) == (parts, parts)


def test_files_and_repr(monkeypatch):
    monkeypatch.delenv("SAMFAST_BACKEND", raising=False)
    layer = PHMLinear(8, 12, 2)
    assert "in_features=8, out_features=12, bias=True, n=2" in repr(layer)
    x = torch.randn(3, 8)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    other = PHMLinear(8, 12, 2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    quaternion = QuaternionLinear(8, 12)
    other = copy.deepcopy(quaternion).half()
    assert torch.equal(copy.deepcopy(other).float().half()(x.half()), other(x.half()))
    assert layer.double().backends() == {"hypercomplex": "torch"}
    monkeypatch.setenv("SAMFAST_BACKEND", "cpu")
    assert "x is torch.float64" in layer.backends()["hypercomplex"]


@pytest.mark.parametrize("way", ["to_empty", "assign", "half and back"])
def test_signs_of_a_quaternion_layer_are_never_lost(way):
    layer = QuaternionLinear(8, 12)
    if way == "half and back":
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(parameter.half())
        other = copy.deepcopy(layer).half().float()
    else:
        other = QuaternionLinear(8, 12, device="meta")
        other = other.to_empty(device="cpu") if way == "to_empty" else other
        other.load_state_dict(layer.state_dict(), assign=way == "assign")
    x = torch.randn(3, 8)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.weight, layer.weight)
    assert not list(layer.buffers())


def test_signs_are_made_once_and_of_real_tensors(monkeypatch):
    """Not of what stands for one: a trace, a transform or inference leaves nothing behind."""
    monkeypatch.setattr(phm_layer, "_kept", {})
    layer, x = QuaternionLinear(8, 12), torch.randn(3, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(layer)
        for name in layer.PARTS:
            setattr(fake, name, torch.nn.Parameter(mode.from_tensor(layer.get_parameter(name))))
        assert fake.weight.shape == (12, 8)
    torch.func.grad(lambda t: (t.sum() * hamilton_rules(layer.bias)).sum())(x)
    torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert not phm_layer._kept
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected) and layer.i_weight.grad is not None
    assert layer.parts()[0] is copy.deepcopy(layer).parts()[0] and len(phm_layer._kept) == 1
    with mode:
        assert fake.weight.shape == (12, 8)  # not by the ones that are kept, which are no fakes


def test_factored_weights():
    """As many parameters, nn.Linear's variance at the start, files, what a forward saves."""
    torch.manual_seed(0)
    for n, rank in ((16, 2), (8, 3), (4, 8)):
        layer, stock = PHMLinear(512, 256, n, rank), nn.Linear(512, 256)
        assert 0.8 < layer.weight.std() / stock.weight.std() < 1.25
        assert sum(p.numel() for p in layer.parameters()) == n**3 + rank * (512 + 256) + 256
    assert set(layer.state_dict()) == {"rules", "left", "right", "bias"}
    assert "n=4, rank=8" in repr(layer)
    assert pickle.loads(pickle.dumps(layer)).left.equal(layer.left)
    assert layer.backends() == {"kronecker_factors": "torch"}
    x, columns = torch.randn(100, 512), 4 * 4 * 8
    saved = saved_bytes(lambda: layer(x), [x, *layer.parameters()])
    assert saved.hooks <= 4 * columns * (100 + 512 + 256)  # their bottleneck and two factors
    assert "hypercomplex" in PHMLinear(8, 8, 2, 3).backends()  # where the matrix is fewer FLOP


def test_factored_from_linear():
    """What has the form is found again; otherwise each weight is cut to its rank."""
    torch.manual_seed(0)
    like, linear = PHMLinear(8, 12, 2, 1).double(), nn.Linear(8, 12, dtype=torch.float64)
    with torch.no_grad():
        like.rules[1].zero_()
        linear.weight.copy_(like.weight)
    found = PHMLinear.from_linear(linear, 2, 1)
    assert found.bias is linear.bias and found.rank == 1
    assert (found.weight - linear.weight).abs().max() <= 64 * torch.finfo(torch.float64).eps
    linear = nn.Linear(8, 12, dtype=torch.float64)
    full, cut = PHMLinear.from_linear(linear, 2), PHMLinear.from_linear(linear, 2, 2)
    values = torch.linalg.svdvals(full.weights)
    lost = (cut.left @ cut.right.mT - full.weights).square().sum((1, 2))
    kept = values[:, 2:].square().sum(1)
    assert (lost - kept).abs().max() <= 1000 * torch.finfo(torch.float64).eps * kept.max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_from_linear_of_a_weight_that_is_not_finite(bad):
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[1, 2] = bad
    with pytest.raises(ValueError, match="the weight contains NaN or infinity"):
        PHMLinear.from_linear(linear, 2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: QuaternionLinear(10, 8), "four equal parts, but 10 inputs do not divide by 4"),
        (lambda: QuaternionLinear(8, 6), "four equal parts, but 6 outputs do not divide by 4"),
        (lambda: QuaternionLinear(0, 8), "0 inputs do not divide by 4"),
        (lambda: QuaternionLinear(8.0, 8), r"equal parts, but 8\.0 inputs do not divide by 4"),
        (lambda: PHMLinear(0, 16, 4), "a whole number of inputs above 0, not 0"),
        (lambda: PHMLinear(16, True, 1), "a whole number of outputs above 0, not True"),
        (lambda: PHMLinear(8, 8, 2, 5), "rank 5 is above 4, the smaller side of parts of 4 x 4"),
        (lambda: PHMLinear(8, 8, 2, 0), "rank is 0; it must be a whole number of at least 1"),
        (lambda: PHMLinear(8, 9, 2), "n is 2, which does not divide the 9 outputs"),
        (lambda: PHMLinear(7, 9, 3), "n is 3, which does not divide the 7 inputs"),
        (lambda: PHMLinear(8, 8, 0), "n is 0; it must be a whole number of at least 1"),
        (lambda: PHMLinear(8, 8, True), "n is True; it must be a whole number of at least 1"),
    ],
)
def test_bad_sizes_end_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_from_linear_takes_a_plain_linear_only():
    with pytest.raises(TypeError, match=r"expected a plain nn\.Linear, got Conv2d"):
        PHMLinear.from_linear(nn.Conv2d(3, 3, 1), 3)
