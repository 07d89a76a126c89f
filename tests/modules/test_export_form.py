# SPDX-License-Identifier: Apache-2.0
"""``export_form``: the same numbers from torch's own operators alone."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import samfast
from samfast.methods.conv_lora.dense import DenseConvLora
from samfast.methods.kronecker.phm_layer import PHMLinear, QuaternionLinear
from samfast.models import MultiTaskSam, Task, architectures, build_sam, segment
from tests.budgets import within_budget

SIZE = 64
SMALL = architectures.Architecture(48, 2, 3, (1,), window=3, image_size=SIZE)
TASKS = (Task("cells", "binary"), Task("kinds", "semantic", 3))
NAMES = tuple(task.name for task in TASKS)
METHODS = {
    "lora": samfast.Lora(target=("qkv", "proj", "lin1", "lin2")),
    "lora-in-decoder": samfast.Lora(target=r".*transformer\.layers\.0\.mlp\.lin1"),
    "cobot-lora": samfast.CobotLora(),
    "kronecker": samfast.Kronecker(),
    "conv-lora": samfast.ConvLora(experts=3),
    "everywhere": samfast.ConvLora(experts=3, target=("qkv", "proj", "lin1", "lin2")),
    "depthwise": samfast.ConvLora(experts=3, depthwise=True),
    "two-experts": samfast.ConvLora(experts=3, top_k=2),
    "paper": samfast.ConvLora(experts=3, formula="paper"),
    "adaptformer": samfast.AdaptFormer(),
    "cobot-adaptformer": samfast.AdaptFormer(cobot=True),
    "decoder": samfast.DecoderOnly(),
}


class Called(TorchDispatchMode):
    """Every operator that is called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))

    def of_samfast(self):
        return {name for name in self.names if name.startswith("samfast")}


@pytest.fixture
def base(monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, "vit_tiny", SMALL)
    return build_sam("vit_tiny", image_size=SIZE, seed=3)


def moved(model, seed=5):
    """Every trained tensor some way from where it began, and gates that decide clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 2.0 if name.endswith("w_gate") else 0.05
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pictures(count=2, seed=4):
    return 255 * torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_form_computes_the_same_without_samfast_s_operators(name, base):
    model = moved(samfast.attach(base, METHODS[name]))
    exact_model = copy.deepcopy(model).double()
    fused = samfast.fuse(copy.deepcopy(model))
    images = pictures()
    with Called() as before:
        segment(fused, images)
    assert before.of_samfast()  # what is counted is there to be counted
    form = samfast.export_form(fused)
    with Called() as called:
        ours = segment(form, images)
    assert called.of_samfast() == set()
    exact = segment(exact_model, images.double())
    within_budget(ours, lambda: segment(model, images), exact, torch.float32)


@torch.no_grad()
def test_the_model_stays_as_it_is(base):
    model = samfast.fuse(moved(samfast.attach(base, samfast.ConvLora(experts=3))))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    kinds = [type(module) for module in model.modules()]
    form = samfast.export_form(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    for tensor in form.state_dict().values():
        tensor.zero_()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not form.training and not any(p.requires_grad for p in form.parameters())


@torch.no_grad()
def test_a_merged_adapter_is_taken_as_it_computes(base):
    model = moved(samfast.attach(base, samfast.Lora()))
    expected = samfast.export_form(model).state_dict()
    got = samfast.export_form(samfast.merge(model)).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def differing_routes(form, images):
    """How many layers send maps of the first and second half of a batch to different experts."""
    routes = []
    handles = [
        layer.register_forward_pre_hook(lambda own, args: routes.append(chosen(own, *args)))
        for layer in form.modules()
        if isinstance(layer, DenseConvLora)
    ]

    def chosen(layer, x):
        h = nn.functional.linear(x, layer.lora_A)
        return layer.routes(h)[0]

    with torch.no_grad():
        form.image_encoder((images - form.pixel_mean) / form.pixel_std)
    for handle in handles:
        handle.remove()
    return sum(not torch.equal(*index.chunk(2)) for index in routes)


def test_a_batch_takes_different_experts(base):
    form = samfast.export_form(moved(samfast.attach(base, samfast.ConvLora(experts=3))))
    images = pictures()
    images[1] = 255 - images[1] / 8
    assert differing_routes(form, images) > 0
    assert differing_routes(form, images[:1].repeat(2, 1, 1, 1)) == 0
    with torch.no_grad():
        together, alone = segment(form, images), segment(form, images[1:])
        exact = segment(copy.deepcopy(form).double(), images[1:].double())
        within_budget(together[1:], lambda: segment(form, images[1:]), exact, torch.float32)
        within_budget(alone, lambda: segment(form, images)[1:], exact, torch.float32)


@pytest.mark.parametrize("task", NAMES)
@torch.no_grad()
def test_a_task_of_ta_lora(task, base):
    model = MultiTaskSam(base, TASKS)
    model = moved(samfast.attach(model, samfast.TaLora(tasks=NAMES), train=model.trained_parts()))
    form = samfast.export_form(model, task=task)
    images = pictures()
    exact = copy.deepcopy(model).double()(images.double(), task)
    with Called() as called:
        ours = form(images, task)
    assert called.of_samfast() == set()
    within_budget(ours, lambda: model(images, task), exact, torch.float32)
    (other,) = set(NAMES) - {task}
    with pytest.raises(ValueError, match=f"task '{other}' does not exist; known are 0 {task}"):
        form(images, other)
    assert set(form.mask_decoders) == set(form.no_mask_embeds) == {task}
    assert [own.name for own in model.tasks] == list(NAMES)


def test_several_tasks_of_ta_lora_at_once_are_refused(base):
    model = samfast.attach(base, samfast.TaLora(tasks=2))
    with pytest.raises(ValueError, match=r"2 tasks are set.*export_form\(model, task="):
        samfast.export_form(samfast.set_task(model, "all"))


def test_tasks_without_ta_lora_all_stay(base):
    model = MultiTaskSam(base, TASKS)
    model = samfast.attach(model, samfast.Lora(), train=model.trained_parts())
    assert [task.name for task in samfast.export_form(model).tasks] == list(NAMES)
    with pytest.raises(ValueError, match="no layers with tasks"):
        samfast.export_form(model, task="cells")


def test_a_branch_that_was_changed_is_refused(base):
    model = samfast.attach(base, samfast.AdaptFormer())
    model.image_encoder.blocks[1].mlp.down_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp has a branch whose down_proj has hooks"):
        samfast.export_form(model)


@pytest.mark.parametrize(
    "layer", [PHMLinear(8, 12, 4), PHMLinear(8, 12, 4, 2), QuaternionLinear(8, 12)]
)
@torch.no_grad()
def test_layers_of_kronecker_products(layer):
    x = torch.randn(5, 8)
    form = samfast.export_form(nn.Sequential(layer, nn.ReLU()))
    assert type(form[0]) is nn.Linear
    exact = copy.deepcopy(layer).double()(x.double()).relu()
    within_budget(form(x), lambda: layer(x).relu(), exact, torch.float32)
    assert type(samfast.export_form(layer)) is nn.Linear


@pytest.mark.slow_on_cpu(but=["conv-lora"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_torch_export_gives_the_same_numbers(name, base):
    form = samfast.export_form(moved(samfast.attach(base, METHODS[name])))
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        form.image_encoder, (pixels,), dynamic_shapes=({0: batch},), strict=False
    )
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and not any("samfast" in target for target in called)
    exact = copy.deepcopy(form).double().image_encoder
    for some in (pixels, pixels[:1], torch.cat([pixels, -pixels])):
        got = program.module()(some)
        within_budget(
            got, lambda x=some: form.image_encoder(x), exact(some.double()), torch.float32
        )
