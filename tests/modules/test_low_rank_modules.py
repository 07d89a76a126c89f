# SPDX-License-Identifier: Apache-2.0
"""LoraLinear and QkvLora as drop-ins for nn.Linear: numbers, merging, state, copies."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from budgets import all_within_budget, within_budget
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import samfast
from samfast.backends import triton_missing
from samfast.modules import LoraLinear, QkvLora

RANGES = {"q": 0, "k": 1, "v": 2}


def filled(module, seed=3):
    """The module with a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.lora_B.copy_(0.1 * torch.randn(module.lora_B.shape, generator=generator))
    return module


def lora(linear, **options):
    return filled(LoraLinear.from_linear(linear, rank=4, alpha=6, **options))


def qkv(linear, **options):
    return filled(QkvLora.from_linear(linear, rank=2, slices=("q", "v"), **options))


def literal(module, x):
    """The formula with plain calls, in x's dtype."""
    y = F.linear(x, module.weight.to(x.dtype), module.bias.to(x.dtype))
    a, b = module.lora_A.to(x.dtype), module.lora_B.to(x.dtype)
    if isinstance(module, LoraLinear):
        return y + module.alpha / module.rank * F.linear(F.linear(x, a), b)
    parts = list(y.chunk(3, dim=-1))
    for i, name in enumerate(module.slices):
        length = module.out_features // 3
        a_i = a[i * module.rank : (i + 1) * module.rank]
        b_i = b[i * length : (i + 1) * length]
        parts[RANGES[name]] = parts[RANGES[name]] + F.linear(F.linear(x, a_i), b_i)
    return torch.cat(parts, dim=-1)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(20, 36)


KINDS = pytest.mark.parametrize("kind", [lora, qkv], ids=["lora", "qkv"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)


@KINDS
def test_starts_as_the_linear_and_shares_it(kind, linear):
    state = torch.random.get_rng_state()
    module = {lora: LoraLinear, qkv: QkvLora}[kind].from_linear(linear.eval(), rank=3)
    assert module.weight is linear.weight and module.bias is linear.bias
    assert isinstance(module, nn.Linear) and not module.training
    assert not torch.equal(state, torch.random.get_rng_state())  # A is random
    assert module.lora_A.abs().max() <= 20**-0.5 and module.lora_A.std() > 0.4 * 20**-0.5
    x = torch.randn(5, 20)
    assert torch.equal(module(x), linear(x))
    assert set(module.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}


def test_constructors_make_their_own_weight():
    module = LoraLinear(6, 9, 2, bias=False, dtype=torch.bfloat16)
    assert module.bias is None and module.weight.dtype == torch.bfloat16
    assert module.lora_A.dtype == module.lora_B.dtype == torch.float32
    assert module.scaling == 1.0
    module = QkvLora(6, 9, 2, ("v", "k"), dtype=torch.float64)
    assert module.slices == ("k", "v") and module.ranges == ((3, 6), (6, 9))
    assert module.lora_A.shape == (4, 6) and module.lora_B.shape == (6, 2)
    assert module.lora_A.dtype == torch.float64
    filled(module).reset_parameters()
    assert not module.lora_B.any() and module.lora_A.any()
    meta = LoraLinear(6, 9, 2, device="meta")
    assert meta.lora_A.is_meta and meta.weight.is_meta


@KINDS
@DTYPES
def test_forward_and_gradients(kind, dtype, linear):
    module = kind(linear.to(dtype)).requires_grad_(True)
    x = torch.randn(2, 7, 20).to(dtype)
    dy = torch.randn(2, 7, 36).to(dtype)
    wanted = [x, *module.parameters()]

    def run(function, cast):
        leaves = [t.detach().to(cast).requires_grad_(True) for t in wanted]
        twin = copy.deepcopy(module)
        for (name, _), leaf in zip(module.named_parameters(), leaves[1:], strict=True):
            delattr(twin, name)
            setattr(twin, name, leaf)
        y = function(twin, leaves[0])
        return [y, *torch.autograd.grad(y, leaves, dy.to(cast))]

    x_leaf = x.clone().requires_grad_(True)
    y = module(x_leaf)
    ours = [y, *torch.autograd.grad(y, [x_leaf, *module.parameters()], dy)]
    assert y.dtype == dtype
    stock, exact = (partial(run, literal, kind) for kind in (dtype, torch.float64))
    all_within_budget(ours, stock, exact, dtype)
    assert [g.dtype for g in ours[1:]] == [dtype] + [p.dtype for p in module.parameters()]


@KINDS
def test_merged_equals_unmerged(kind, linear):
    for dtype in (torch.float32, torch.bfloat16):
        module = kind(copy.deepcopy(linear).to(dtype)).eval()
        before = module.weight.detach().clone()
        parameter, storage = module.weight, module.weight.data_ptr()
        x = torch.randn(64, 20).to(dtype)
        stock = partial(literal, copy.deepcopy(module), x)
        exact = partial(literal, copy.deepcopy(module).double(), x.double())
        module.merge()
        assert module.merged and module.weight is parameter
        # Rounded once, from a float32 sum.
        assert torch.equal(module.weight, (before.float() + module.delta_weight()).to(dtype))
        assert not torch.equal(module.weight, before)
        within_budget(module(x), stock, exact, dtype)
        assert torch.equal(module(x), F.linear(x, module.weight, module.bias))
        module.unmerge()
        assert not module.merged and module.weight.data_ptr() == storage
        assert torch.equal(module.weight, before)


@KINDS
def test_merge_twice_folds_present_values_and_unmerge_twice_does_nothing(kind, linear):
    module = kind(linear).eval()
    before = module.weight.detach().clone()
    module.merge()
    once = module.weight.detach().clone()
    module.merge()
    assert torch.equal(module.weight, once)
    filled(module, seed=9)
    module.merge()
    assert not torch.equal(module.weight, once)
    module.unmerge()
    module.unmerge()
    assert torch.equal(module.weight, before)


def test_merged_refuses_training(linear):
    module = lora(linear).train()
    module.merge()
    with pytest.raises(RuntimeError, match="merged adapter cannot be trained"):
        module(torch.randn(3, 20))
    with torch.no_grad():
        module(torch.randn(3, 20))
    x = torch.randn(3, 20, requires_grad=True)
    module.eval()(x).sum().backward()
    assert x.grad is not None and module.lora_A.grad is None


@KINDS
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_copies_keep_everything(kind, merged, linear):
    module = kind(linear).eval()
    x = torch.randn(3, 20)
    original = module.weight.detach().clone()
    if merged:
        module.merge()
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    ):
        assert twin.merged == merged and twin.weight is not module.weight
        assert torch.equal(twin(x), module(x))
        twin.unmerge()
        assert torch.equal(twin.weight, original)
    assert module.merged == merged


@KINDS
def test_state_dict_has_the_plain_weight_merged_or_not(kind, linear):
    module = kind(linear).eval()
    x = torch.randn(3, 20)
    unmerged = {name: value.clone() for name, value in module.state_dict().items()}
    module.merge()
    merged = module.state_dict()
    assert list(merged) == list(unmerged)
    assert all(torch.equal(merged[name], unmerged[name]) for name in merged)

    other = kind(nn.Linear(20, 36)).eval()
    with torch.no_grad():
        other.lora_A.zero_()
    other.merge()
    other.load_state_dict(merged)
    assert other.merged and torch.equal(other(x), module(x))
    other.unmerge()
    assert torch.equal(other.weight, unmerged["weight"])


@KINDS
def test_to_moves_the_kept_weight_too(kind, linear):
    module = kind(linear).eval()
    expected = module.weight.detach().to(torch.bfloat16)
    module.merge()
    module.to(torch.bfloat16)
    module(torch.randn(3, 20, dtype=torch.bfloat16))
    module.unmerge()
    assert torch.equal(module.weight, expected)


@KINDS
def test_dropout_acts_in_training_only(kind, linear):
    module = kind(linear, dropout=0.5).eval()
    x = torch.randn(50, 20)
    plain = module(x)
    assert torch.equal(module(x), plain)
    module.train()
    torch.manual_seed(5)
    first = module(x)
    assert not torch.equal(first, plain) and not torch.equal(module(x), first)
    torch.manual_seed(5)
    assert torch.equal(module(x), first)
    module.dropout = 0.0
    assert torch.equal(module(x), plain)


@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_dropout(kind, reentrant, linear):
    module = kind(linear, dropout=0.5).train()
    x = torch.randn(9, 20, requires_grad=True)
    leaves = [x, module.lora_A, module.lora_B]

    def gradients(function):
        torch.manual_seed(4)
        for leaf in leaves:
            leaf.grad = None
        function(x).square().sum().backward()
        return [leaf.grad.clone() for leaf in leaves]

    expected = gradients(module)
    got = gradients(lambda x: checkpoint(module, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@KINDS
def test_autocast_and_empty_batches_as_the_linear(kind, linear):
    module = kind(linear)
    x = torch.randn(4, 20)
    for merged in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == linear(x).dtype == torch.bfloat16
        assert module(x[:0]).shape == (0, 36)
        assert module(x[0]).shape == (36,)
        if not merged:
            module.eval().merge()
    module.unmerge()
    module.train()(x[:0]).square().sum().backward()
    assert not module.lora_B.grad.any()


@KINDS
def test_only_what_requires_a_gradient_gets_one(kind, linear):
    linear.requires_grad_(False)
    module = kind(linear)
    module(torch.randn(3, 20)).sum().backward()
    assert module.weight.grad is None and module.bias.grad is None
    assert module.lora_A.grad is not None and module.lora_B.grad is not None
    module.weight.requires_grad_(True)
    module(torch.randn(3, 20)).sum().backward()
    assert module.weight.grad is not None and module.bias.grad is None


@KINDS
def test_compiles_without_graph_break(kind, linear):
    module = kind(linear, dropout=0.0)
    x = torch.randn(4, 20)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(x).square().sum(), module(x).square().sum()
    assert torch.equal(loss, expected)
    ours = torch.autograd.grad(loss, [module.lora_A, module.lora_B])
    theirs = torch.autograd.grad(expected, [module.lora_A, module.lora_B])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LoraLinear(8, 8, 0), "rank is 0; it must be a whole number of at least 1"),
        (lambda: LoraLinear(8, 8, 2.0), "rank is 2.0"),
        (lambda: LoraLinear(8, 8, True), "rank is True"),
        (lambda: LoraLinear(8, 6, 7), "rank 7 is above 6, .* with 8 inputs and 6 outputs"),
        (lambda: LoraLinear(8, 8, 2, alpha=0), "alpha is 0; it must be a finite number above 0"),
        (lambda: LoraLinear(8, 8, 2, dropout=1.0), "dropout is 1.0; it must be at least 0"),
        (lambda: QkvLora(8, 16, 2), "16 outputs do not divide by 3"),
        (lambda: QkvLora(8, 12, 5), "rank 5 is above 4, .* with 8 inputs and 4 outputs"),
        (lambda: QkvLora(8, 12, 2, ()), "at least one of 'q', 'k' and 'v'"),
        (lambda: QkvLora(8, 12, 2, ("q", "o")), "slices has 'o'"),
        (lambda: QkvLora(8, 12, 2, ("q", "q")), "names a slice twice"),
    ],
)
def test_bad_sizes_end_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_from_linear_takes_a_plain_linear_only(linear):
    module = lora(linear)
    with pytest.raises(TypeError, match="got LoraLinear"):
        LoraLinear.from_linear(module, 2)


def test_repr_names_the_options(linear):
    module = lora(linear, dropout=0.1)
    assert "rank=4, alpha=6, dropout=0.1" in repr(module)
    module.merge()
    assert repr(module).endswith("merged)")
    assert "slices=q,v" in repr(qkv(nn.Linear(20, 36)))


@pytest.mark.skipif(triton_missing(torch.device("cpu")) is not None, reason="Triton cannot run")
def test_the_backend_named_is_the_one_a_forward_takes_under_autocast(monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    module = LoraLinear(160, 120, rank=100)
    (refused,) = module.backends().values()
    assert "above 32, the widest tile for torch.float32" in refused
    with pytest.raises(RuntimeError, match="above 32, the widest tile for"):
        module(torch.ones(2, 160))
    with torch.autocast("cpu", torch.float16):
        assert module.backends() == {"lora_linear": "triton"}
        module(torch.ones(2, 160))
    wide = LoraLinear(160, 120, rank=100, dtype=torch.float64)
    with torch.autocast("cpu", torch.float16):
        assert "x is torch.float64" in wide.backends()["lora_linear"]


@pytest.mark.parametrize(
    "method",
    [
        samfast.Lora(rank=2),
        samfast.Lora(rank=2, slices=("q", "v")),
        samfast.CobotLora(),
        samfast.Kronecker(n=2, rank=2),
    ],
    ids=["lora", "sliced", "cobot", "kronecker"],
)
def test_autocast_has_no_say_in_a_merged_weight(toy, move, method):
    """Products in bfloat16 would be folded in otherwise; merged state dicts and loading too."""
    model = move(samfast.attach(toy(), method, train=()))
    expected = samfast.merged_state_dict(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = samfast.merged_state_dict(model)
        samfast.merge(model)
        model.load_state_dict(model.state_dict())
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in expected.items():
        assert torch.equal(found[name], value) and torch.equal(now[name], value), name
