# SPDX-License-Identifier: Apache-2.0
"""CobotQkvLora: published numbers, sharing, lifetimes of what is folded, files, merging."""

import copy
import io
import pickle

import pytest
import safetensors
import torch
from budgets import all_within_budget, keep, within_budget
from cobot_files import check, relation_of, state_of
from draws import DEVICE
from stock_runs import by_reference
from torch import nn
from torch.utils.checkpoint import checkpoint

import samfast
from samfast import backends
from samfast.counters import count, saved_bytes
from samfast.kernels._common.budget import Budget
from samfast.methods.cobot.layer import CobotForward, relation
from samfast.models import build_sam
from samfast.modules import CobotQkvLora

HEADS = {f"head_{s}.{c}": f"FacT_d{d}.{c}_weight" for d, s in ((1, "q"), (2, "v")) for c in "rijk"}
PUBLISHED = {f"linear_{x}_{s}": f"linear_{x}_{s}.weight" for x in "ab" for s in "qv"}
PUBLISHED |= {"gamma": "gamma", **HEADS}


def layers_of(tensors, dtype):
    shared = relation_of(tensors, dtype)
    layers = []
    for i in range(3):
        weight = tensors[f"block{i}.qkv.weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=DEVICE, dtype=dtype)
        layer = CobotQkvLora.from_linear(linear, shared[0].shape[1], shared, i)
        state = state_of(tensors, f"block{i}", PUBLISHED)
        state |= {name: tensors[f"block{i}.qkv.{name}"] for name in ("weight", "bias")}
        layer.load_state_dict(state)
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
        layers.append(layer)
    return layers


@pytest.mark.slow_on_cpu("triton", "cpu", "torch-together", "reference-together")
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
@pytest.mark.parametrize("backend", [name for name in backends.NAMES if name != "cuda"])
def test_golden(backend, together, monkeypatch):
    check("cobot_lora", layers_of, PUBLISHED, backend, together, monkeypatch)


@pytest.mark.slow_on_cpu("vit_l")
@pytest.mark.parametrize("model, count", [("vit_b", 864), ("vit_l", 2880)])
def test_extra_parameters_are_as_many_as_published(model, count):
    """Counted in the whole model, on a device without memory."""
    methods = samfast.Lora(rank=4, slices=("q", "v")), samfast.CobotLora()
    lora, cobot = (
        samfast.attach(build_sam(model, random_init=True, device="meta"), method, train=())
        for method in methods
    )
    counts = [sum(p.numel() for _, p in samfast.trainable_parameters(m)) for m in (lora, cobot)]
    assert counts[1] - counts[0] == count
    assert samfast.report(cobot).adapter_parameters == counts[1]


def attached(sam, **options):
    samfast.attach(sam, samfast.CobotLora(**options), train=())
    return sam


def step(encoder, images):
    """The result and the gradients of a fixed product of it."""
    trained = dict(samfast.trainable_parameters(encoder))
    for parameter in trained.values():
        parameter.grad = None
    y = encoder(images)
    generator = torch.Generator().manual_seed(2)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    names = {name: name.removeprefix("_orig_mod.") for name in trained}
    return {"y": y.detach(), **{names[n]: p.grad.clone() for n, p in trained.items()}}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def images():
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [False, True])
def test_folding_alone_and_together_are_one(tiny_sam, images, fused):
    """Hooks make it together; a forward without them folds layer by layer, to the same bits."""
    encoder = attached(tiny_sam()).image_encoder
    if fused:
        samfast.fuse(encoder)
    together = step(encoder, images)
    qkv = encoder.blocks[0].attn.qkv
    assert qkv.given is None
    alone = copy.deepcopy(encoder)
    alone._forward_pre_hooks.clear()
    names = [n for n in together if not n.endswith(("FacT_c", "FacT_p"))]
    found = step(alone, images)
    assert all(torch.equal(together[n], found[n]) for n in names)
    rest = [n for n in together if n not in names]  # summed over the layers in another order
    wide = copy.deepcopy(alone).double()
    stock, exact = by_reference(step, alone, images), by_reference(step, wide, images.double())
    budget = Budget(stock, exact, torch.float32)
    for run in (found, together):
        keep(budget, {n: run[n] for n in rest}, some=True)


def test_fused_blocks_save_what_lora_saves(tiny_sam, images, move):
    """And, once for all blocks, the folded factors."""
    saved = {}
    for method in (samfast.Lora(rank=4, slices=("q", "v")), samfast.CobotLora()):
        encoder = samfast.fuse(samfast.attach(tiny_sam(), method, train=()).image_encoder)
        assert set(samfast.report(encoder).blocks.values()) == {"fused"}
        known = [images, *encoder.parameters(), *encoder.buffers()]
        found = saved_bytes(lambda encoder=encoder: encoder(images), known)
        assert found.hooks == found.living
        saved[method.name] = found.hooks
    folded = sum(block.attn.qkv.lora_B.nbytes for block in encoder.blocks)
    assert saved["cobot-lora"] == saved["lora"] + folded


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(tiny_sam, images, reentrant):
    encoder = attached(tiny_sam()).image_encoder
    plain = step(encoder, images)
    for block in encoder.blocks:
        forward = block.forward
        block.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=reentrant)
    images = images.requires_grad_()
    kept = step(encoder, images)
    names = [n for n in plain if not n.endswith(("FacT_c", "FacT_p"))]
    assert all(torch.equal(plain[n], kept[n]) for n in names)
    assert all(torch.equal(plain[n], kept[n]) or reentrant for n in plain)


def test_micro_batches_accumulate(tiny_sam, images):
    """Two forwards before one backward, and each with its own: neither reuses a graph."""
    encoder = attached(tiny_sam()).image_encoder

    def losses(encoder, images):
        """Of the images and of their mirror images, in that order."""
        return (encoder(x).sum() for x in (images, images.flip(3)))

    def gradients(encoder, loss):
        trained = dict(samfast.trainable_parameters(encoder))
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    def one_by_one(encoder, images):
        one, two = (gradients(encoder, loss) for loss in losses(encoder, images))
        return {name: one[name] + two[name] for name in one}

    both = gradients(encoder, sum(losses(encoder, images)))
    wide = copy.deepcopy(encoder).double()
    stock, exact = (
        by_reference(one_by_one, encoder, images),
        by_reference(one_by_one, wide, images.double()),
    )
    all_within_budget(both, stock, exact, torch.float32)


def test_an_encoder_never_folds_layer_by_layer(tiny_sam, images, monkeypatch):
    """In training and in prediction: each layer takes its share."""
    encoder = attached(tiny_sam()).image_encoder
    expected = encoder(images)

    def alone(self):
        raise AssertionError("a layer folded for itself")

    monkeypatch.setattr(CobotQkvLora, "alone", alone)
    assert torch.equal(encoder(images), expected)
    with torch.no_grad():
        assert torch.equal(encoder(images), expected)


def test_relation_parameters_are_coefficients_and_heads(tiny_sam):
    """Which a method may give another learning rate."""
    layer = attached(tiny_sam()).image_encoder.blocks[1].attn.qkv
    expected = (layer.FacT_c, layer.FacT_p, layer.gamma, layer.heads)
    assert all(a is b for a, b in zip(layer.relation_parameters(), expected, strict=True))


def test_a_failed_forward_leaves_nothing_behind(tiny_sam, images):
    encoder = attached(tiny_sam()).image_encoder
    with pytest.raises(RuntimeError):
        encoder(images[:, :2])
    assert all(block.attn.qkv.given is None for block in encoder.blocks)


def test_an_interrupt_leaves_nothing_that_is_used(tiny_sam, images, move):
    """Hooks do not run then: what was folded stays behind, and is not taken once a weight moves."""
    sam = attached(tiny_sam())
    block = sam.image_encoder.blocks[1]
    interrupt = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sam.image_encoder(images)
    interrupt.remove()
    qkv = block.attn.qkv
    assert qkv.given is not None and copy.deepcopy(qkv).given is None
    move(sam)
    other = attached(tiny_sam())
    other.load_state_dict(sam.state_dict())
    x = torch.randn(2, qkv.in_features)
    assert torch.equal(qkv(x), other.image_encoder.blocks[1].attn.qkv(x))
    ours, theirs = (samfast.merged_state_dict(model) for model in (sam, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_share_is_not_taken_once_a_tensor_is_another(tiny_sam):
    """Or has other memory, though none was written to."""
    layers = [block.attn.qkv for block in attached(tiny_sam()).image_encoder.blocks]
    shared, layer = CobotForward(layers), layers[1]

    def replace():
        layer.gamma = nn.Parameter(2 * layer.gamma.detach())

    def other_memory():
        layer.gamma.data = 2 * layer.gamma.detach()

    for change in (replace, other_memory):
        shared.open(layer, ())
        stale = layer.factors()[1]
        change()
        fresh = layer.factors()[1]
        assert torch.equal(fresh, layer.alone()[0]) and not torch.equal(fresh, stale)


def test_a_replica_hands_the_layers_of_the_model_nothing(tiny_sam):
    """Its own thread would do so in the midst of another's forward."""
    encoder = attached(tiny_sam()).image_encoder
    layers = [block.attn.qkv for block in encoder.blocks]
    CobotForward(layers).open(encoder._replicate_for_data_parallel(), ())
    assert all(layer.given is None for layer in layers)


def test_a_prediction_beside_a_training_step_takes_no_gradient_away(tiny_sam, images):
    """As by another thread with the same model: its shares have no graph."""
    encoder = attached(tiny_sam()).image_encoder
    expected = step(encoder, images)
    shared = CobotForward([block.attn.qkv for block in encoder.blocks])

    def predict(*_):
        with torch.no_grad():
            shared.open(encoder, ())

    encoder.blocks[1].register_forward_pre_hook(predict)
    found = step(encoder, images)
    names = [n for n in expected if not n.endswith(("FacT_c", "FacT_p"))]
    assert all(torch.equal(expected[n], found[n]) for n in names)


@pytest.mark.parametrize("fused", [False, True])
def test_replicas_and_functional_calls(tiny_sam, images, fused):
    """Where parameters are plain tensors."""
    encoder = attached(tiny_sam()).image_encoder
    if fused:
        samfast.fuse(encoder)
    plain = {name: p.detach() + 0 for name, p in encoder.named_parameters()}
    plain |= {
        f"blocks.{i}.attn.qkv.{name}": plain[f"blocks.0.attn.qkv.{name}"]
        for i in range(len(encoder.blocks))
        for name in ("FacT_c", "FacT_p")
    }
    with torch.no_grad():
        y = torch.func.functional_call(encoder, plain, (images,))
        assert torch.equal(y, encoder(images))
        replicas = {name: m._replicate_for_data_parallel() for name, m in encoder.named_modules()}
        for name, replica in replicas.items():
            for child in dict(encoder.get_submodule(name).named_children()):
                replica._modules[child] = replicas[f"{name}.{child}" if name else child]
            for own, p in encoder.get_submodule(name)._parameters.items():
                given = None if p is None else plain[f"{name}.{own}" if name else own]
                setattr(replica, own, given)
        assert torch.equal(replicas[""](images), y)


def test_a_relation_that_came_apart_is_tied_or_refused(tiny_sam, images):
    sam = attached(tiny_sam())
    state = {name: t.clone() for name, t in sam.state_dict().items()}
    y = sam.image_encoder(images)
    sam.load_state_dict(state, assign=True)
    layers = [block.attn.qkv for block in sam.image_encoder.blocks]
    assert len({id(layer.FacT_c) for layer in layers} | {id(layer.FacT_p) for layer in layers}) == 2
    assert torch.equal(sam.image_encoder(images), y)
    layers[1].FacT_p = nn.Parameter(layers[1].FacT_p.detach().clone())
    with pytest.raises(RuntimeError, match="no longer share FacT_c and FacT_p"):
        sam.image_encoder(images)
    (name,) = (n for n in state if n.endswith("blocks.1.attn.qkv.FacT_p"))
    state[name] = state[name] + 1
    with pytest.raises(RuntimeError, match="FacT_p of layer 1 and of layer 0 differ"):
        sam.load_state_dict(state, assign=True)


def test_an_update_of_the_weights_is_seen_at_once(tiny_sam, images):
    encoder = attached(tiny_sam()).image_encoder
    before = encoder(images)
    encoder.blocks[0].attn.qkv.FacT_c.data.mul_(2.0)
    after = encoder(images)
    assert not torch.equal(before, after)
    encoder.blocks[0].attn.qkv.FacT_c.data.mul_(0.5)
    assert torch.equal(before, encoder(images))


def test_copies_and_pickles_share_among_themselves(tiny_sam, images):
    sam = attached(tiny_sam())
    sam.image_encoder(images)
    buffer = io.BytesIO()
    pickle.dump(sam, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(sam), pickle.load(buffer)):
        layers = [block.attn.qkv for block in other.image_encoder.blocks]
        assert len({id(layer.FacT_c) for layer in layers}) == 1
        assert layers[0].FacT_c is not sam.image_encoder.blocks[0].attn.qkv.FacT_c
        assert equal(step(other.image_encoder, images), step(sam.image_encoder, images))


@pytest.mark.slow_on_cpu
def test_compiled_whole(tiny_sam, images):
    encoder = attached(tiny_sam()).image_encoder
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    assert equal(step(encoder, images), step(compiled, images) | {})


def test_zero_start_is_the_frozen_model(tiny_sam, images):
    frozen = tiny_sam().image_encoder(images)
    assert torch.equal(attached(tiny_sam(), zero_start=True).image_encoder(images), frozen)
    assert not torch.equal(attached(tiny_sam()).image_encoder(images), frozen)


def test_merged_equals_unmerged(tiny_sam, images, move):
    sam = attached(tiny_sam()).eval()
    move(sam)
    unmerged, wide = copy.deepcopy(sam).image_encoder, copy.deepcopy(sam).double().image_encoder
    names = set(sam.state_dict())
    samfast.merge(sam)
    stock, exact = by_reference(unmerged, images), by_reference(wide, images.double())
    within_budget(sam.image_encoder(images), stock, exact, torch.float32)
    assert set(sam.state_dict()) == names
    plain = tiny_sam()
    state = samfast.merged_state_dict(sam)
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    assert torch.equal(plain.image_encoder(images), sam.image_encoder(images))


def test_files_hold_published_names_and_shared_tensors_once(tiny_sam, images, move, tmp_path):
    sam = attached(tiny_sam())
    move(sam)
    samfast.save_adapter(sam, tmp_path / "adapter")
    with safetensors.safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert sum(name.endswith("FacT_p") for name in names) == 1
    assert "image_encoder.blocks.1.attn.qkv.FacT_d2.k_weight" in names
    other = tiny_sam()
    samfast.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other.image_encoder(images), sam.image_encoder(images))
    samfast.load_adapter(attached(tiny_sam()), tmp_path / "adapter")


@pytest.mark.slow_on_cpu
def test_launches_beyond_plain_lora(tiny_sam, monkeypatch):
    """Six in a step, whatever the number of blocks: none in a block, no host sync."""
    if (reason := backends.triton_missing(DEVICE)) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    layers = [block.attn.qkv.to(DEVICE) for block in attached(tiny_sam()).image_encoder.blocks]
    shared = CobotForward(layers)
    trained = [p for _, p in samfast.trainable_parameters(nn.ModuleList(layers))]
    trained = [p for p in trained if not any(p is layer.lora_A for layer in layers)]
    given = torch.ones(layers[0].lora_B.shape, device=DEVICE)  # the gradients of the blocks

    def fold():
        shared.open(layers[0], ())
        folded = [layer.factors()[1] for layer in layers]
        shared.close(layers[0], (), None)
        return torch.autograd.grad(folded, trained, [given] * len(folded))

    counts = count(fold)
    assert counts.launches == {
        "cat": 2,  # the sources, and again before the backward
        "fold_kernel": 1,
        "stack": 1,
        "fold_backward_kernel": 1,
        "shared_backward_kernel": 1,
    }
    assert counts.total_syncs == 0


PAIRS = {
    "lora": (samfast.Lora(rank=4, slices=("q", "v")), samfast.CobotLora(), {"cat": 2, "stack": 1}),
    "adaptformer": (
        samfast.AdaptFormer(dropout=0.0),
        samfast.AdaptFormer(cobot=True, dropout=0.0),
        {"cat": 2, "stack": 2},  # of factors' gradients and of biases'
    ),
}


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("name", PAIRS)
def test_launches_of_a_whole_encoder(tiny_sam, images, name, monkeypatch):
    """In fused blocks nothing more than without a relation, whatever their number."""
    if (reason := backends.triton_missing(DEVICE)) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("SAMFAST_BACKEND", "triton")
    plain, related, gathered = PAIRS[name]
    found = []
    for method in (plain, related):
        encoder = tiny_sam().image_encoder.to(DEVICE)
        encoder.blocks = encoder.blocks[:2]
        samfast.fuse(samfast.attach(encoder, method, train=()))
        assert set(samfast.report(encoder).blocks.values()) == {"fused"}
        trained = [p for _, p in samfast.trainable_parameters(encoder)]

        def run(encoder=encoder, trained=trained):
            torch.autograd.grad(encoder(images.to(DEVICE)).sum(), trained)

        found.append(count(run))
    without, counts = found
    folding = {"fold_kernel": 1, "fold_backward_kernel": 1, "shared_backward_kernel": 1}
    assert counts.launches - without.launches == gathered | folding
    assert not without.launches - counts.launches
    assert counts.total_syncs == without.total_syncs == 0


def test_layers_of_several_widths_fold_by_themselves():
    """No operation stacks them; each is what it is alone."""
    narrow, wide = nn.Linear(16, 48), nn.Linear(24, 72)
    shared = relation(4, 4, narrow.weight)
    layers = [
        CobotQkvLora.from_linear(layer, 4, shared, i) for i, layer in enumerate((narrow, wide))
    ]
    fold = CobotForward(layers)
    assert not fold.together() and CobotForward(layers[:1]).together()
    x = torch.randn(3, 24)
    alone = layers[1](x)
    fold.open(layers[0], ())
    assert torch.equal(layers[1](x), alone)
    fold.close(layers[0], (), None)


def test_a_wide_layer_has_a_wide_relation():
    linear = nn.Linear(16, 48, dtype=torch.float64)
    wide = CobotQkvLora(16, 48, dtype=torch.float64), CobotQkvLora.from_linear(linear)
    for layer in wide:
        assert {p.dtype for _, p in layer.adapter_parameters()} == {torch.float64}


def test_made_without_memory_and_filled_later():
    layer = CobotQkvLora(16, 48, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.FacT_c, torch.ones(1, 4, 2))
    assert torch.equal(layer.FacT_p, torch.eye(2))
    assert torch.equal(layer.gamma, torch.ones(8))


def test_bad_input(tiny_sam):
    linear = nn.Linear(16, 48)
    with pytest.raises(ValueError, match="rank is 6, but the four parts of a quaternion"):
        samfast.CobotLora(rank=6)
    with pytest.raises(
        ValueError, match="slices 6 to 7 are outside the relation matrix, which has 6"
    ):
        CobotQkvLora.from_linear(linear, 4, relation(4, 6, linear.weight), 3)
    with pytest.raises(ValueError, match="but the shared relation has 8"):
        CobotQkvLora.from_linear(linear, 4, relation(8, 6, linear.weight), 0)
    for index in (True, 1.0, "1", -1):
        with pytest.raises(ValueError, match=rf"index is {index!r}; it must be a whole number"):
            CobotQkvLora(16, 48, index=index)
    with pytest.raises(ValueError, match="already has an adapter"):
        attached(attached(tiny_sam()))
    with pytest.raises(
        ValueError, match=r"attn.proj: a packed qkv layer has three outputs for each"
    ):
        attached(tiny_sam(), target="proj")
    with pytest.raises(ValueError, match="do not divide by 3"):
        CobotQkvLora.from_linear(nn.Linear(16, 40))
