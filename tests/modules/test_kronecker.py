# SPDX-License-Identifier: Apache-2.0
"""KroneckerLinear and the method on a model: numbers, merging, files, fused blocks, bytes."""

import copy

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from budgets import all_within_budget, within_budget
from draws import DEVICE
from literal_kronecker import LiteralKronecker, filled
from stock_runs import by_reference
from torch import nn

import samfast
from samfast.backends import triton_missing
from samfast.counters import count, saved_bytes
from samfast.modules import KroneckerLinear, LoraLinear
from samfast.modules.adapter_files import TENSORS


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(24, 36)


def test_starts_as_the_linear_and_shares_it(linear):
    """To the bit, also in training and with dropout."""
    module = KroneckerLinear.from_linear(linear.eval(), n=3, rank=2, alpha=8, dropout=0.1)
    assert module.weight is linear.weight and module.bias is linear.bias
    assert isinstance(module, nn.Linear) and not module.training
    x = torch.randn(5, 24)
    for training in (False, True):
        assert torch.equal(module.train(training)(x), linear(x))
    assert not module.kron_left.any()
    assert set(module.state_dict()) == {
        "weight", "bias", "kron_rules", "kron_left", "kron_right"
    }  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in module.adapter_parameters()}
    assert shapes == {"kron_rules": (3, 3, 3), "kron_left": (3, 12, 2), "kron_right": (3, 8, 2)}
    assert module.scaling == 4.0
    filled(module).reset_parameters()
    assert not module.kron_left.any() and module.kron_right.abs().max() <= 8**-0.5


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_equals_unmerged(dtype, n, linear):
    module = filled(KroneckerLinear.from_linear(linear.to(dtype), n=n, rank=2, alpha=3)).eval()
    literal = LiteralKronecker(module)
    literal.load_state_dict(module.state_dict())
    literal, unmerged = literal.double(), copy.deepcopy(module)
    before, storage = module.weight.detach().clone(), module.weight.data_ptr()
    x = torch.randn(64, 24).to(dtype)
    module.merge()
    assert module.merged and not torch.equal(module.weight, before)
    assert torch.equal(module.weight, (before.float() + module.delta_weight()).to(dtype))
    within_budget(module(x), by_reference(unmerged, x), lambda: literal(x.double()), dtype)
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))
    module.unmerge()
    assert module.weight.data_ptr() == storage and torch.equal(module.weight, before)


def test_backends_and_repr(linear, monkeypatch):
    monkeypatch.delenv("SAMFAST_BACKEND", raising=False)
    module = KroneckerLinear.from_linear(linear, n=2, rank=3, dropout=0.1)
    assert "n=2, rank=3, alpha=3, dropout=0.1" in repr(module)
    assert set(module.backends()) == {"lora_linear", "kronecker_factors"}
    monkeypatch.setenv("SAMFAST_BACKEND", "torch")
    assert set(module.backends().values()) == {"torch"}
    monkeypatch.setenv("SAMFAST_BACKEND", "cpu")
    assert module.backends()["kronecker_factors"] == "torch"
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    assert "cannot run kronecker_factors" in module.double().backends()["kronecker_factors"]
    monkeypatch.delenv("SAMFAST_BACKEND")
    module.merge()
    assert repr(module).endswith("merged)")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: KroneckerLinear(8, 9, 2), "n is 2, which does not divide the 9 outputs"),
        (lambda: KroneckerLinear(7, 9, 3), "n is 3, which does not divide the 7 inputs"),
        (lambda: KroneckerLinear(8, 8, 2.0), "n is 2.0; it must be a whole number"),
        (lambda: KroneckerLinear(8, 8, 2, 0), "rank is 0; it must be a whole number"),
        (lambda: KroneckerLinear(8, 8, 2, 5), "rank 5 is above 4, .* of the 2 x 2 parts"),
        (lambda: KroneckerLinear(8, 8, alpha=-1), "alpha is -1; it must be a finite number"),
        (lambda: KroneckerLinear(8, 8, dropout=1.0), "dropout is 1.0; it must be at least 0"),
        (lambda: samfast.Kronecker(n=-1), "n is -1; it must be a whole number"),
        (lambda: samfast.Kronecker(target=()), r"target is \(\); it must name at least one"),
    ],
)
def test_bad_options_end_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_launches_beside_lora():
    """Two more than LoRA: the factors forwards and backwards."""
    if DEVICE.type == "cpu" and triton_missing(DEVICE):
        pytest.skip(triton_missing(DEVICE))
    x, counts = torch.randn(32, 16, device=DEVICE), {}
    dy = torch.randn(32, 24, device=DEVICE)
    for layer in (KroneckerLinear(16, 24, n=2), LoraLinear(16, 24, rank=4)):
        layer = layer.to(DEVICE)
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
        trained = [p for p in layer.parameters() if p.requires_grad]

        def call(layer=layer, trained=trained):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SAMFAST_BACKEND", "triton")
                return torch.autograd.grad(layer(x), trained, dy)

        counts[type(layer)] = count(call)
    ours, lora = counts[KroneckerLinear], counts[LoraLinear]
    assert ours.total_launches == lora.total_launches + 2 and ours.total_syncs == 0


# On models


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def attached(sam, move=None, **options):
    torch.manual_seed(8)
    model = samfast.attach(sam, samfast.Kronecker(**{"n": 4, **options}), train=())
    return model if move is None else move(model, std=0.2)


def test_defaults_and_counts(tiny_sam):
    assert samfast.Kronecker().config() == {
        "name": "kronecker", "n": 4, "rank": 1, "alpha": None, "dropout": 0.0,
        "target": ["qkv", "proj"],
    }  # fmt: skip
    report = samfast.report(attached(tiny_sam()))
    width, depth = 192, 6
    each = 64 + width // 4 * 4 + 3 * width // 4 * 4, 64 + 2 * (width // 4) * 4
    assert report.adapter_parameters == depth * sum(each)
    assert set(report.layers.values()) == {"KroneckerLinear"} and len(report.layers) == 2 * depth
    assert {"lora_linear", "kronecker_factors"} <= set(report.backends)
    model = attached(tiny_sam(), n=2, rank=3, alpha=6, dropout=0.1, target="lin1")
    layers = [m for m in model.modules() if isinstance(m, KroneckerLinear)]
    assert len(layers) == depth
    for layer in layers:
        assert (layer.n, layer.rank, layer.alpha, layer.dropout) == (2, 3, 6, 0.1)


def test_starts_at_the_frozen_model(tiny_sam, images):
    expected = tiny_sam().image_encoder(images)
    model = attached(tiny_sam())
    assert torch.equal(model.image_encoder(images), expected)
    fused = samfast.fuse(tiny_sam())
    expected = fused.image_encoder(images)
    assert torch.equal(attached(samfast.fuse(tiny_sam())).image_encoder(images), expected)


def gradients(model, images, dtype=None, seed=4):
    encoder = model.image_encoder
    if dtype is not None:
        encoder = copy.deepcopy(encoder).to(dtype)
    named = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    torch.manual_seed(seed)
    y = encoder(images.to(next(encoder.parameters()).dtype))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    grads = torch.autograd.grad(y, list(named.values()), dy)
    return dict(zip(["y", *named], [y.detach(), *grads], strict=True))


def test_fused_equals_unfused(tiny_sam, images, move):
    """Under the budget in float32, against the modules' own forward in float64; the memory modes
    to the bit, with dropout."""
    sam = tiny_sam()
    sam.image_encoder.blocks = sam.image_encoder.blocks[:3]
    model = attached(sam, move)
    first = model.image_encoder.blocks[0]
    first.register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))  # the neck's layout
    stock, exact = (
        by_reference(gradients, model, images),
        by_reference(gradients, model, images, torch.float64),
    )
    fused = samfast.fuse(copy.deepcopy(model))
    assert set(samfast.report(fused).blocks.values()) == {"fused"}
    ours = gradients(fused, images)
    assert set(ours) == {"y", *(n for n, _ in samfast.trainable_parameters(model.image_encoder))}
    all_within_budget(ours, stock, exact, torch.float32)
    for layer in fused.modules():
        if isinstance(layer, KroneckerLinear):
            layer.dropout = 0.2
    fused.train()
    runs = [
        gradients(samfast.fuse(fused, memory), images) for memory in ("fast", "balanced", "minimal")
    ]
    for run in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(value, run[name]), name


def test_what_a_fused_block_keeps(tiny_sam, move):
    """10 · D elements per token and the bottleneck's own: z of rank n · n · k, and the factors."""
    sam = samfast.fuse(attached(tiny_sam(), move))
    block = sam.image_encoder.blocks[2]
    x = torch.randn(2, 20, 20, 192)
    saved = saved_bytes(lambda: block(x), [x, *block.parameters()])
    tokens, width, rank = 2 * 20 * 20, 192, 16
    floor = 4 * tokens * (10 * width - width)  # x is known here
    factors = 4 * rank * ((width + 3 * width) + 2 * width)
    own = 4 * tokens * 2 * rank + factors
    assert saved.hooks == saved.living
    assert saved.hooks <= 1.10 * (floor + own)
    # beyond that it keeps lse, a number for each head and token, and two fitted tables
    assert saved.hooks - floor - own <= 4 * tokens * 3 + 4 * 2 * 39 * 64


def test_merge_and_files(tiny_sam, images, move, tmp_path):
    model = attached(tiny_sam(), move, rank=2, alpha=3).eval()
    with torch.no_grad():
        expected = model.image_encoder(images)
        unmerged = copy.deepcopy(model.image_encoder)
        wide = copy.deepcopy(unmerged).double()
        stock, exact = by_reference(unmerged, images), by_reference(wide, images.double())
        samfast.merge(model)
        assert samfast.report(model).merged == 12
        within_budget(model.image_encoder(images), stock, exact, torch.float32)
        folder = samfast.save_adapter(model, tmp_path / "adapter")
        samfast.unmerge(model)
        assert torch.equal(model.image_encoder(images), expected)
    tensors = safetensors.torch.load_file(folder / TENSORS)
    leaves = {name.rpartition(".")[2] for name in tensors}
    assert leaves == {"kron_rules", "kron_left", "kron_right"} and len(tensors) == 36
    loaded = samfast.load_adapter(tiny_sam(), folder).eval()
    assert samfast.report(loaded).method == samfast.Kronecker(n=4, rank=2, alpha=3)
    with torch.no_grad():
        assert torch.equal(loaded.image_encoder(images), expected)
    plain = tiny_sam()
    plain.load_state_dict(samfast.merged_state_dict(model))


def test_layers_of_a_size_that_n_does_not_divide(tiny_sam):
    with pytest.raises(
        ValueError, match=r"attn\.qkv: n is 5, which does not divide the 192 inputs"
    ):
        samfast.attach(tiny_sam(), samfast.Kronecker(n=5))


def test_a_narrow_base_keeps_the_adapter_in_float32(tiny_sam, images):
    model = samfast.attach(tiny_sam(), samfast.Kronecker(), train=(), base_dtype=torch.bfloat16)
    samfast.fuse(model)
    y = model.image_encoder(images.bfloat16())
    y.sum().backward()
    own = [p for _, p in samfast.trainable_parameters(model)]
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in own} == {p.grad.dtype for p in own} == {torch.float32}


def test_three_steps_move_every_tensor(tiny_sam, images):
    model = samfast.fuse(attached(tiny_sam()))
    named = dict(samfast.trainable_parameters(model))
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = torch.optim.SGD(named.values(), lr=0.01)
    target = torch.randn(2, 256, 4, 4)  # the neck's norm keeps the sum of squares
    for _ in range(3):
        optimizer.zero_grad()
        (model.image_encoder(images) * target).sum().backward()
        optimizer.step()
    assert not [name for name, p in named.items() if torch.equal(p, before[name])]
