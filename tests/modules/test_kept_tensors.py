# SPDX-License-Identifier: Apache-2.0
"""What a forward leaves on its module does not reach into the next, whichever mode made it."""

import copy
import pickle

import pytest
import torch
from every_method import METHODS, adapted, assert_same, step
from torch import nn
from torch.nn import functional as F

import samfast
from samfast.kernels.conv_experts import axis
from samfast.methods.cobot.layer import CobotForward
from samfast.methods.ta_lora.layer import TaskForward
from samfast.models import MultiTaskSam, Task
from samfast.modules import CobotQkvLora, ConvLoraLinear, LoraLinear, TaskLoraLinear

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.slow_on_cpu(
    "adaptformer", "cobot-adaptformer", "kronecker", "qkv-lora", "conv-lora-depthwise"
)
@pytest.mark.parametrize("name", METHODS)
def test_predictions_leave_training_as_it_was(name, tiny_sam, move):
    """In inference mode, under no_grad, before weights are loaded, before and after a step."""
    encoder = adapted(tiny_sam(), name, move)
    fresh = copy.deepcopy(encoder)
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    expected = step(fresh, IMAGES)
    with torch.inference_mode():
        encoder.train()(IMAGES)
        encoder.eval()(IMAGES)
    copies = [copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))]
    for model in (encoder, *copies):
        assert_same(step(model.train(), IMAGES), expected)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.25 if parameter.requires_grad else 1.0)
        other = encoder.eval()(IMAGES)
    encoder.load_state_dict(state)
    assert_same(step(encoder.train(), IMAGES), expected)
    for model in (encoder, fresh):
        torch.optim.SGD(filter(lambda p: p.requires_grad, model.parameters()), 1.0).step()
    with torch.inference_mode():
        y = encoder.eval()(IMAGES)
        assert torch.equal(y, fresh.eval()(IMAGES))
        assert not torch.equal(y, other)
    assert_same(step(encoder.train(), IMAGES), step(fresh.train(), IMAGES))


def test_tasks_that_inference_mode_set(tiny_sam, move):
    tasks = [Task("edges", "binary"), Task("depth", "regression")]
    model = MultiTaskSam(tiny_sam(), tasks)
    method = samfast.TaLora(tasks=("edges", "depth"), ranks=(4, 3, 2), dropout=0.0)
    samfast.attach(model, method, train=model.trained_parts())
    samfast.fuse(move(model))
    fresh = copy.deepcopy(model)

    def gradients(model):
        sum(y.square().mean() for y in model(IMAGES).values()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with torch.inference_mode():  # the training below asks for the same tasks
        model(IMAGES)
    assert_same(gradients(model), gradients(fresh))


def test_tasks_that_a_compiled_graph_kept():
    """Such a graph, run in inference mode, leaves its own tensor on the layer."""
    layer = TaskLoraLinear(8, 24, 2, (4, 3, 2), dropout=0.0)
    with torch.inference_mode():
        layer.entries = torch.zeros(1, dtype=torch.int64)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.td_G.grad is not None


@pytest.mark.parametrize("kind", [TaskForward, CobotForward])
def test_a_share_made_in_inference_mode_is_not_trained_on(kind):
    """Such as by a prediction in another thread, with the adapter frozen here."""
    linear = nn.Linear(8, 24)
    layer = (
        TaskLoraLinear.from_linear(linear, 2, (4, 3, 2), dropout=0.0)
        if kind is TaskForward
        else CobotQkvLora.from_linear(linear, 4)
    )
    x = torch.randn(2, 8, requires_grad=True)
    layer.requires_grad_(False)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    with torch.inference_mode():
        kind([layer]).open(layer, (x,))
    assert layer.given[0].is_inference()
    assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], expected)


def test_merged_in_inference_mode():
    """The gradient of the input needs the merged weight."""
    layer = LoraLinear.from_linear(nn.Linear(8, 8).requires_grad_(False), 2).eval()
    nn.init.normal_(layer.lora_B)
    x, before = torch.randn(3, 8, requires_grad=True), layer.weight.clone()
    with torch.inference_mode():
        layer.merge()
        layer.load_state_dict(layer.state_dict())
    plain = F.linear(x, layer.weight.detach().clone(), layer.bias)
    made = [torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), plain)]
    assert torch.equal(*made) and not torch.equal(layer.weight, before)
    with torch.inference_mode():
        layer.unmerge()
    assert torch.equal(layer.weight, before)
    layer.train()(x).sum().backward()


def test_an_export_leaves_no_balancing_loss():
    """What stands for tensors while a graph is exported is worth nothing afterwards."""
    layer = ConvLoraLinear(8, 8, 2, experts=2).eval()
    torch.export.export(layer, (torch.randn(1, 4, 4, 8),))
    with pytest.raises(RuntimeError, match="ran none; run it first"):
        samfast.aux_loss(layer)


def test_tables_made_under_a_default_device():
    """Those of the torch backend outlive the call that makes them."""
    made = []
    for device in ("meta", "cpu"):
        axis.matrices.cache_clear()
        with torch.device(device):
            made.append(axis.matrices(5, 2))
    assert torch.equal(*made)
