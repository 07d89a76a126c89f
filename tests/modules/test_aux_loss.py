# SPDX-License-Identifier: Apache-2.0
"""aux_loss: the balancing term of the latest forward, and its gradient whatever recomputes."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import samfast
from samfast.adapters import latest_loss
from samfast.adapters.adapter import adapters

MODES = pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])


@pytest.fixture
def build(toy, move):
    """A toy with Conv-LoRA on both qkv layers and random adapters, in training."""

    def make(**options):
        torch.manual_seed(0)
        method = samfast.ConvLora(rank=2, alpha=3, experts=4, **options)
        return move(samfast.attach(toy(), method), std=0.3).train()

    return make


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def plain(block, x):
    return block(x)


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def nonreentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


def nested(block, x):
    return checkpoint(lambda t: checkpoint(block, t, use_reentrant=True), x, use_reentrant=True)


def mixed(block, x):
    return checkpoint(lambda t: checkpoint(block, t, use_reentrant=False), x, use_reentrant=True)


def together(blocks, x):
    return checkpoint(blocks, x, use_reentrant=True)


def forward(model, images, call, needs_input=True):
    encoder = model.image_encoder
    x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + encoder.pos_embed
    x = x.detach().requires_grad_(needs_input)  # reentrant checkpoints run for such inputs alone
    if call is together:
        x = call(torch.nn.Sequential(*encoder.blocks), x)
    else:
        for block in encoder.blocks:
            x = call(block, x)
    return model.mask_decoder(x).squeeze(-1)


def task(logits):
    return F.binary_cross_entropy_with_logits(logits, (logits.detach() > 0.3).float())


def gradients(model):
    found = {n: p.grad for n, p in samfast.trainable_parameters(model)}
    assert all(grad is not None for grad in found.values())
    return copy.deepcopy(found)


def step(model, images, call=plain, scale=1.0, seed=3, weight=1.0):
    """Loss terms and gradients of one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = task(forward(model, images, call))
    aux = samfast.aux_loss(model)
    ((loss + weight * aux) * scale).backward()
    return aux.detach(), gradients(model)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def gates(grads):
    return {n: g for n, g in grads.items() if n.rpartition(".")[2] in ("w_gate", "w_noise")}


def test_is_the_sum_over_layers_with_gradients_for_the_gates_alone_from_it(build, images):
    model, kept = build(), []
    for layer in adapters(model).values():
        layer.register_forward_hook(lambda m, args, y: kept.append(m.latest_loss().value))
    aux, grads = step(model, images)
    assert len(kept) == 2 and torch.equal(aux, torch.stack(kept).sum()) and aux > 0
    assert all(g.any() for g in gates(grads).values())
    _, without = step(model, images, weight=0.0)
    assert not any(g.any() for g in gates(without).values())
    assert not torch.equal(
        grads["image_encoder.blocks.0.attn.qkv.lora_A"],
        without["image_encoder.blocks.0.attn.qkv.lora_A"],
    )


@pytest.mark.parametrize("call", [reentrant, nonreentrant, nested, mixed, together])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit(build, images, call, dropout):
    model = build(dropout=dropout)
    for scale in (1.0, 3.0, 2.0**14):  # as a loss scaler multiplies
        aux, grads = step(model, images, scale=scale)
        again, checkpointed = step(model, images, call, scale=scale)
        assert torch.equal(aux, again)
        assert_equal(grads, checkpointed)
        assert torch.equal(samfast.aux_loss(model), aux)  # recomputation left it alone


@pytest.mark.parametrize("call", [reentrant, nonreentrant, nested, mixed, together])
def test_checkpointing_without_the_term_leaves_the_gates_at_zero(build, images, call):
    model = build()
    for weight in (1.0, 0.0):
        _, grads = step(model, images, weight=weight)
        _, checkpointed = step(model, images, call, weight=weight)
        assert_equal(grads, checkpointed)

    torch.manual_seed(3)
    model.zero_grad()
    loss = task(forward(model, images, call))
    samfast.aux_loss(model)  # looked at, and not added
    loss.backward()
    assert_equal(gradients(model), grads)


@pytest.mark.parametrize("call", [plain, reentrant, nonreentrant])
def test_micro_batches_add_up(build, images, call):
    model = build()
    parts = [step(model, part, call, seed=i)[1] for i, part in enumerate(images.split(2))]
    model.zero_grad()
    for i, part in enumerate(images.split(2)):
        torch.manual_seed(i)
        (task(forward(model, part, call)) + samfast.aux_loss(model)).backward()
    summed = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert_equal(gradients(model), summed)


@pytest.mark.parametrize("call", [reentrant, nonreentrant])
def test_two_forwards_before_one_backward(build, images, call):
    model, results = build(), []
    for kind in (plain, call):
        torch.manual_seed(5)
        model.zero_grad()
        losses = []
        for part, weight in ((images[:2], 1.0), (images[1:], 7.0)):
            losses.append(task(forward(model, part, kind)) + weight * samfast.aux_loss(model))
        sum(losses).backward()
        results.append(gradients(model))
    assert_equal(*results)


def test_a_term_of_another_step_is_refused_and_forgotten(build, images):
    model = build()
    _, expected = step(model, images, reentrant)
    stale = samfast.aux_loss(model)
    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match=r"did not reach 2 of 2 layers.*use_reentrant=False"):
        (task(forward(model, images, reentrant)) + stale).backward()
    _, grads = step(model, images, reentrant)
    assert_equal(grads, expected)


def test_a_checkpoint_that_recomputes_nothing_is_noticed(build, images):
    model = build()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        logits = forward(model, images, reentrant, needs_input=False)
    with pytest.raises(RuntimeError, match="let the checkpoint's input require a gradient"):
        (task(logits) + samfast.aux_loss(model)).backward()
    forward(model, images, reentrant)
    with pytest.raises(RuntimeError, match="did not reach 2 of 2 layers"):
        samfast.aux_loss(model).backward()  # without the encoder's own backward


@pytest.mark.parametrize("call", [plain, reentrant, nonreentrant])
def test_copies_after_a_forward_are_empty(build, images, call):
    model = build()
    aux = step(model, images, call)[0]
    forward(model, images, call)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(
            RuntimeError, match="expected a forward before aux_loss, but this ToySam ran none"
        ):
            samfast.aux_loss(twin)
        assert torch.equal(step(twin, images, call)[0], aux)
    samfast.aux_loss(model)


def test_prediction_between_steps_changes_nothing(build, images):
    model = build()
    expected = step(model, images, reentrant)
    with torch.no_grad():
        model.eval()(images)
        value = samfast.aux_loss(model)
        assert not value.requires_grad and value > 0
    model(images).sum().backward()
    assert not samfast.aux_loss(model).requires_grad  # the gate is no noise's, so it is constant
    (model(images).sum() + samfast.aux_loss(model)).backward()
    with torch.inference_mode():
        model(images)
        samfast.aux_loss(model)
    got = step(model.train(), images, reentrant)
    assert torch.equal(got[0], expected[0])
    assert_equal(got[1], expected[1])


@MODES
def test_autocast_and_checkpointing(build, images, reentrant):
    model, results = build(), []

    def under(block, x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(block, x, use_reentrant=reentrant)

    def alone(block, x):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    for call in (alone, under):
        results.append(step(model, images, call))
        assert results[-1][0].dtype == torch.float32
    assert torch.equal(results[0][0], results[1][0])
    assert_equal(results[0][1], results[1][1])


def test_a_checkpoint_that_redraws_would_be_noticed(build, images):
    def redraws(block, x):
        return checkpoint(block, x, use_reentrant=True, preserve_rng_state=False)

    model = build()
    _, expected = step(model, images)
    _, grads = step(model, images, redraws)
    assert any(not torch.equal(expected[n], grads[n]) for n in gates(grads))


@MODES
def test_layers_that_do_not_see_the_recomputation(build, images, reentrant, monkeypatch):
    """They lose the gradient, which is noticed, or replace the value of the forward."""
    model = build()

    def call(block, x):
        return checkpoint(block, x, use_reentrant=reentrant)

    def values():
        return [layer.latest_loss().value for layer in adapters(model).values()]

    monkeypatch.setattr(latest_loss, "recomputing", lambda: False)
    loss = task(forward(model, images, call)) + samfast.aux_loss(model)
    kept = values()
    if reentrant:
        with pytest.raises(RuntimeError, match="did not reach 2 of 2 layers"):
            loss.backward()
    else:
        loss.backward()
    assert all(a is not b for a, b in zip(kept, values(), strict=True))


def test_models_without_a_term(toy, images):
    lora = samfast.attach(toy(), samfast.Lora(rank=2))
    decoder = samfast.attach(toy(), samfast.DecoderOnly())
    for model in (lora, decoder):
        zero = samfast.aux_loss(model)
        assert zero.shape == () and zero == 0 and not zero.requires_grad
    with pytest.raises(ValueError, match="this ToySam has no adapter"):
        samfast.aux_loss(toy())


def test_before_a_forward(build):
    with pytest.raises(RuntimeError, match="this ToySam ran none"):
        samfast.aux_loss(build())


def test_frozen_adapters_give_a_constant(build, images):
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mask_decoder"))
    for call in (plain, reentrant, nonreentrant):
        logits = forward(model, images, call, needs_input=False)
        (task(logits) + samfast.aux_loss(model)).backward()
        assert model.mask_decoder.lin1.weight.grad is not None


@pytest.mark.slow_on_cpu
def test_compiled_model(build, images):
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (model, compiled, compiled):
        torch.manual_seed(3)
        model.zero_grad()
        loss = task(call(images)) + samfast.aux_loss(call)
        aux = samfast.aux_loss(call)
        loss.backward()
        results.append((aux.detach(), gradients(model)))
    for aux, grads in results[1:]:
        assert torch.equal(aux, results[0][0])
        assert_equal(grads, results[0][1])


@pytest.mark.slow_on_cpu("nonreentrant")
@pytest.mark.slow_on_cpu("reentrant")
@MODES
def test_compiled_blocks_in_checkpoints(build, images, reentrant):
    model = build()
    _, expected = step(model, images)
    blocks = {
        block: torch.compile(block, fullgraph=True, backend="aot_eager")
        for block in model.image_encoder.blocks
    }

    def call(block, x):
        return checkpoint(blocks[block], x, use_reentrant=reentrant)

    if reentrant:  # compiled code does not see that it is run a second time
        with pytest.raises(RuntimeError, match="did not reach 2 of 2 layers"):
            step(model, images, call)
    else:
        assert_equal(step(model, images, call)[1], expected)


def test_a_layer_called_twice_in_a_reentrant_checkpoint_is_refused(build, images):
    """A recomputation cannot tell the calls apart; without reentrance the last call counts."""
    model = build()
    logits = forward(model, images, lambda block, x: block(block(x)))
    expected = torch.autograd.grad(task(logits) + samfast.aux_loss(model), _trained(model))
    assert all(grad.any() for grad in expected)
    forward(model, images, lambda block, x: reentrant(lambda t: block(block(t)), x))
    with pytest.raises(RuntimeError, match="a layer ran 2 training forwards without a graph"):
        samfast.aux_loss(model)


def _trained(model):
    return [p for _, p in samfast.trainable_parameters(model)]


def test_a_frozen_layer_behind_a_trained_one_passes_its_share_on(build, images):
    """Its term depends on x, and so on the layers before it."""
    results = []
    for call in (plain, together):
        model = build()
        for parameter in list(adapters(model).values())[-1].parameters():
            parameter.requires_grad_(False)
        torch.manual_seed(3)
        logits = forward(model, images, call)
        (task(logits) + 100 * samfast.aux_loss(model)).backward()
        results.append(gradients(model))
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name
