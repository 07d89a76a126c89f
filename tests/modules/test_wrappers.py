# SPDX-License-Identifier: Apache-2.0
"""Models inside what other libraries put around them: looked through, or named in a sentence."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import samfast
from samfast.adapters.adapter import adapters
from samfast.adapters.attachment import attachment
from samfast.adapters.wrappers import prefix_of, unwrapped
from samfast.methods.attach import attach_to
from samfast.models import MultiTaskSam, Task, binary_head, head_of, image_size, segment

IMAGES = torch.arange(3 * 64 * 64, dtype=torch.float32).view(1, 3, 64, 64) % 256


class Module(nn.Module):
    """As a LightningModule of a user's: the model, a loss and a metric without parameters."""

    def __init__(self, model):
        super().__init__()
        self.net = model
        self.loss = nn.BCEWithLogitsLoss(pos_weight=torch.ones(1))
        self.metric = nn.Identity()

    def forward(self, x):
        return segment(self.net, x)


class WithHead(Module):
    def __init__(self, model):
        super().__init__(model)
        self.head = nn.Linear(1, 1)


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.student, self.teacher = first, second


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "averaged": (AveragedModel, "module."),
    "lightning": (Module, "net."),
    "parallel": (nn.DataParallel, "module."),
    "compiled": (compiled, "_orig_mod."),
    "nested": (lambda model: AveragedModel(compiled(Module(model))), "module._orig_mod.net."),
}
QUICK = ("lightning", "nested")  # nested has the others in it
EACH = pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        pytest.param(*case, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, case in WRAPPERS.items()
    ],
)


@pytest.mark.slow_on_cpu("lightning")
@EACH
def test_every_function_works_on_the_model_inside(tiny_sam, move, tmp_path, wrap, prefix):
    sam = move(samfast.attach(binary_head(tiny_sam()), samfast.Lora(rank=2)))
    wrapped = wrap(sam)
    assert prefix_of(wrapped) == prefix and type(unwrapped(wrapped)) is type(sam)
    assert image_size(wrapped) == 64 and head_of(wrapped) == "binary"
    report = samfast.report(wrapped)
    assert report == samfast.report(sam) and report.method == samfast.Lora(rank=2)
    folder = samfast.save_adapter(sam, tmp_path / "sam")
    other = samfast.save_adapter(wrapped, tmp_path / "wrapped")
    for file in folder.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()
    state, plain = samfast.merged_state_dict(wrapped), samfast.merged_state_dict(sam)
    assert state.keys() == plain.keys() == tiny_sam().state_dict().keys()
    with torch.no_grad():
        expected = segment(sam, IMAGES)
        fused = segment(samfast.fuse(wrapped), IMAGES)
        assert samfast.report(wrapped).memory == ("fast",)
        assert torch.equal(fused, segment(unwrapped(wrapped), IMAGES))
        samfast.unfuse(wrapped)
        around = wrap(tiny_sam())
        assert samfast.load_adapter(around, folder) is around
        assert torch.equal(segment(around, IMAGES), expected)
        samfast.unmerge(samfast.merge(around))
        assert torch.equal(segment(around, IMAGES), expected)


@pytest.mark.parametrize("how", ["lightning", "parallel", "compiled"])
def test_attach_takes_names_with_the_prefix_or_without(toy, how):
    wrap, prefix = WRAPPERS[how]
    for target, train in (("qkv", "mask_decoder"), (r".*blocks\.\d\.attn\.qkv", "mask_decoder")):
        for before in ("", prefix):
            regex = target if target.isidentifier() else before.replace(".", r"\.") + target
            model = wrap(toy())
            assert samfast.attach(model, samfast.Lora(target=regex), train=before + train) is model
            trained = dict(samfast.trainable_parameters(unwrapped(model)))
            assert len(attachment(unwrapped(model)).layers) == 2
            assert sum("lora_" in name for name in trained) == 4
            assert sum(name.startswith("mask_decoder.") for name in trained) == 4
    with pytest.raises(ValueError, match=r"is already attached|already has an adapter"):
        samfast.attach(model, samfast.Lora())


def test_attach_refuses_wrappers_that_keep_a_list_of_parameters(toy):
    with pytest.raises(ValueError, match=r"is inside a AveragedModel, .* attach first, then make"):
        samfast.attach(AveragedModel(toy()), samfast.Lora())


def test_an_average_of_an_attached_model_follows_it(toy, move, tmp_path):
    model = samfast.attach(toy(), samfast.Lora(rank=2))
    average = AveragedModel(model, avg_fn=lambda mean, new, _: (mean + new) / 2)
    average.update_parameters(model)
    before = copy.deepcopy(model)
    average.update_parameters(move(model))
    folder = samfast.save_adapter(average, tmp_path / "average")
    loaded = dict(samfast.load_adapter(toy(), folder).named_parameters())
    moved, start = dict(model.named_parameters()), dict(before.named_parameters())
    for name, parameter in samfast.trainable_parameters(model):
        assert torch.equal(loaded[name], (start[name] + moved[name]) / 2), name
        assert not torch.equal(loaded[name], parameter)


def test_a_wrapper_with_more_than_the_sam_is_not_guessed(tiny_sam, tmp_path):
    sam = samfast.attach(tiny_sam(), samfast.Lora(rank=2))
    more, two = WithHead(sam), Two(sam, tiny_sam())
    hint = "this WithHead has no adapter; it has parameters in addition to those of its net: pass"
    with pytest.raises(ValueError, match=rf"{hint} model\.net$"):
        samfast.save_adapter(more, tmp_path / "a")
    parts = "its parts student and teacher hold a SAM each: pass one of them$"
    with pytest.raises(ValueError, match=f"this Two has no adapter; {parts}"):
        samfast.save_adapter(two, tmp_path / "a")
    with pytest.raises(TypeError, match=f"expected a Sam of segment_anything, got Two; {parts}"):
        segment(two, IMAGES)
    with pytest.raises(TypeError, match=r"got WithHead; it has parameters .*: pass model\.net$"):
        segment(more, IMAGES)
    with pytest.raises(ValueError, match=f"this Two has no mask decoder of SAM; {parts}"):
        binary_head(two)
    assert samfast.report(more).method == samfast.report(two).method == samfast.Lora(rank=2)


def test_a_part_that_is_registered_twice_is_one(tiny_sam):
    model = Module(tiny_sam())
    model.encoder, model.again = model.net.image_encoder, model.net
    assert unwrapped(model) is model.net
    model.around = Module(model.net)
    assert unwrapped(model) is model.net


def test_other_models_are_named(tiny_sam):
    tasks = MultiTaskSam(Module(tiny_sam()), [Task("roads")])
    with pytest.raises(TypeError, match=r"got MultiTaskSam; call it with the images instead$"):
        segment(tasks, IMAGES)
    with pytest.raises(TypeError, match=r"got Linear, which has no image_encoder$"):
        segment(nn.Linear(2, 2), IMAGES)
    with pytest.raises(TypeError, match="expected a Sam of segment_anything, got str"):
        segment("sam", IMAGES)
    foreign = nn.Module()
    foreign.vision_encoder = nn.Linear(1, 1)
    with pytest.raises(
        TypeError,
        match=r"got Module; of Hugging Face's .* SamModel, SamHQModel or Sam3TrackerModel$",
    ):
        segment(foreign, IMAGES)


def test_tasks_are_named_through_a_wrapper(toy):
    model = samfast.attach(toy(), samfast.TaLora(ranks=(2, 2, 2), tasks=("a", "b")))
    samfast.set_task(Module(model), "b")
    assert all(layer.chosen == (1,) for layer in adapters(model).values())


def test_an_adapter_that_was_saved_around_the_model_loads_there(toy, move, tmp_path):
    """samfast 0.1.0 attached to a wrapper itself, whose prefix is in the files' names."""
    model = Module(toy())
    attach_to(model, samfast.Lora(rank=2), *_around(model, samfast.Lora(rank=2)), set(), None)
    folder = samfast.save_adapter(move(model), tmp_path / "adapter")
    assert samfast.read_adapter_config(folder)["layers"][0].startswith("net.image_encoder.")
    other = samfast.load_adapter(Module(toy()), folder)
    assert attachment(other) is not None
    state, loaded = model.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], loaded[name]) for name in state)


def _around(model, method):
    layers = {n: m for n, m in model.named_modules() if n.endswith(".attn.qkv")}
    return layers, method.build(layers)
