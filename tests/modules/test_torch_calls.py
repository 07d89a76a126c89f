# SPDX-License-Identifier: Apache-2.0
"""torch's own calls on whole models take every method's parameters."""

import io

import pytest
import torch
from every_method import METHODS, adapted, assert_same, step
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from samfast.modules import ConvLoraLinear

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_vector(model):
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    return model


def through_meta(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    return model


CALLS = (
    nn.Module.share_memory,
    saved_and_loaded,
    through_a_vector,
    through_meta,
    lambda model: model.double().float(),
    lambda model: model.to(memory_format=torch.channels_last),
)


@pytest.mark.slow_on_cpu(
    "adaptformer", "cobot-adaptformer", "kronecker", "qkv-lora", "conv-lora-depthwise"
)
@pytest.mark.parametrize("name", METHODS)
def test_the_same_step_after_each_call(name, tiny_sam, move):
    """One after another on one model; only the last changes what torch's convolutions round."""
    model = adapted(tiny_sam(), name, move)
    expected = step(model, IMAGES)
    for call in CALLS:
        model = call(model)
        if call is CALLS[-1]:
            model.patch_embed.to(memory_format=torch.contiguous_format)
            model.neck.to(memory_format=torch.contiguous_format)
        assert_same(step(model, IMAGES), expected)
    assert all(p.dim() != 5 or p.is_contiguous() for p in trained(model))
    for optimizer in (
        torch.optim.AdamW(trained(model), foreach=True),
        torch.optim.AdamW(trained(model), fused=True),
        torch.optim.LBFGS(trained(model), max_iter=2),
    ):
        before = parameters_to_vector(trained(model)).detach()
        clip_grad_norm_(trained(model), 1.0, foreach=True)
        optimizer.step(lambda: step(model, IMAGES)["loss"])
        after = parameters_to_vector(trained(model)).detach()
        assert after.isfinite().all() and not torch.equal(after, before)


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_contiguous(name, tiny_sam, move):
    """As FSDP and flat gradients ask, with their gradients."""
    model = adapted(tiny_sam(), name, move, fused=False)
    step(model, IMAGES)
    for key, parameter in model.named_parameters():
        assert parameter.is_contiguous(), key
        assert parameter.grad is None or parameter.grad.is_contiguous(), key


def refused(t):
    raise RuntimeError("no such thing")


def test_packed_kernels_take_a_layout_and_a_dtype_at_once():
    """And an error of another kind stays one."""
    layer = ConvLoraLinear(6, 6, 2, experts=2)
    layer.to(torch.float64, memory_format=torch.channels_last)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    with pytest.raises(RuntimeError, match="no such thing"):
        layer._apply(refused)
