# SPDX-License-Identifier: Apache-2.0
"""SAM 3's tracker through finetune, evaluate and predict, by boxes and by points."""

import json
import shutil
import sys

import pytest
import torch
from budgets import all_within_budget
from measured_step import MeasuredStep
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from sam3_models import SIDE, tracker

import samfast
import samfast.training.callbacks
from samfast import cli
from samfast.models import build_sam, segment
from samfast.models.sam3 import TRAINED_DECODER
from samfast.training.build import attach_method, build_base
from samfast.training.dry_run import dry_run
from samfast.training.folders import load_split
from samfast.training.loop import finetune
from samfast.training.predict import load_adapted
from samfast.training.recipe import with_recipe
from samfast.training.settings import FinetuneSettings

BLOCKS = "vision_encoder.backbone.layers."


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Sam3TrackerModel of 56 pixels as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("sam3") / "tracker"
    tracker().save_pretrained(path)
    return path


def settings_of(folder, data=None, output=None, **options):
    return FinetuneSettings(
        **{"model": "sam3", "checkpoint": folder, "data": data, "output": output, "lr": 3e-3},
        **{"epochs": 2, "repeats": 1, "val_fraction": 0.34, "overlays": 0, **options},
    )


@pytest.fixture(scope="module", params=["box", "point"])
def run(request, folder, shared_data, tmp_path_factory):
    output = tmp_path_factory.mktemp(request.param) / "out"
    settings = settings_of(folder, shared_data, output, prompt=request.param)
    return settings, finetune(settings)


def called(capsys, *argv):
    """What a command prints with --json, which is nothing else."""
    assert cli.main([str(word) for word in (*argv, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow_on_cpu("point")
def test_a_run_learns_and_its_adapter_predicts_and_scores(run, folder, tmp_path, capsys):
    settings, _ = run
    lines = (settings.output / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train_loss")
    losses = [float(line.split(",")[column]) for line in lines[1:]]
    assert losses[1] < losses[0]
    adapter = settings.output / "adapter" / "best"
    record = samfast.read_adapter_config(adapter)
    assert record["base"]["name"] == "sam3" and record["image_size"] == SIDE
    pair = load_split(settings.data, val_fraction=0.34).val[0]
    given = {"box": "34,0,51,40", "point": "40,20"}[settings.prompt]
    common = ("--adapter", adapter, "--checkpoint", folder, "--output", tmp_path / "out")
    words = ("predict", pair.image, *common, f"--{settings.prompt}", given)
    (image,) = called(capsys, *words)["images"]
    assert 0 <= image["foreground"] <= 1
    sam = load_adapted(adapter, folder)
    assert set(samfast.report(sam).blocks.values()) == {"fused"}
    assert called(capsys, *words)["images"] == [image]


def test_scores_of_evaluate_are_those_of_the_run(run, folder, tmp_path, capsys):
    settings, summary = run
    data = tmp_path / "val"
    for kind in ("image", "mask"):
        (data / f"{kind}s").mkdir(parents=True)
        for pair in load_split(settings.data, val_fraction=0.34).val:
            file = getattr(pair, kind)
            (data / f"{kind}s" / file.name).write_bytes(file.read_bytes())
    adapter = settings.output / "adapter" / "best"
    words = ("--data", data, "--adapter", adapter, "--checkpoint", folder)
    found = called(capsys, "evaluate", *words, "--output", tmp_path / "scores")
    assert found["val_dice"] == summary["val_dice"]


def test_prompts_that_do_not_fit_are_refused(run, folder, refused):
    settings, _ = run
    image = settings.data / "images" / "p0.png"
    words = ("predict", image, "--checkpoint", folder, "--adapter", settings.output)
    other = {"box": "point", "point": "box"}[settings.prompt]
    given = {"box": "0,0,9,9", "point": "9,9"}
    said = f"was trained with a {settings.prompt} for each image"
    refused(*words, f"--{other}", given[other], pattern=f"{said}; leave out --{other}")
    refused(*words, pattern=f"{said}; give it with --{settings.prompt} x")
    far = {"box": "0,0,99,9", "point": "99,9"}[settings.prompt]
    refused(*words, f"--{settings.prompt}", far, pattern=f"{settings.prompt} {far} is not inside")


@pytest.mark.slow_on_cpu
def test_a_resumed_run_has_the_same_bits(folder, shared_data, tmp_path):
    name = "adapter/last/adapter_model.safetensors"
    whole = settings_of(folder, shared_data, tmp_path / "whole", prompt="point", flips=False)
    finetune(whole)

    class Stopped(Exception):
        pass

    class Stop(samfast.training.callbacks.Callback):
        def on_step(self, run, loss):
            if run.step == 3:
                raise Stopped

    output = tmp_path / "part"
    part = settings_of(folder, shared_data, output, prompt="point", flips=False)
    with pytest.raises(Stopped):
        finetune(part, callbacks=[Stop()])
    words = ["finetune", "--resume", str(output), "--output", str(output)]
    assert cli.main(words) == 0
    assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def step(settings, dtype=torch.float32, prompt=None):
    """Logits and gradients of one step, adapters moved off zero."""
    torch.manual_seed(0)
    sam = attach_method(build_base(settings), settings)
    with torch.no_grad():
        for name, p in sorted(sam.named_parameters()):
            if p.requires_grad and name.startswith(BLOCKS):
                generator = torch.Generator().manual_seed(len(name))
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    images = torch.randint(0, 256, (2, 3, 40, SIDE), generator=torch.Generator().manual_seed(4))
    logits = segment(sam.to(dtype).eval(), images.byte(), prompt)  # eval: no noise in gates
    (logits * torch.linspace(-1, 1, SIDE, dtype=torch.float64).to(dtype)).sum().backward()
    grads = {n: p.grad for n, p in sam.named_parameters() if p.requires_grad}
    return sam, {"logits": logits.detach(), **grads}


BOXES = torch.tensor([[3.0, 4, 40, 30], [10, 0, 50.5, 39]])
METHODS = {
    "lora": {},
    "slices": {"slices": ("q", "v")},
    "conv-lora": {"method": "conv-lora"},
    "decoder": {"method": "decoder"},
}


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("name", METHODS)
def test_fused_agrees_with_not_fused_and_only_adapters_and_decoder_train(folder, name):
    options = {"prompt": "box", **METHODS[name]}
    fused = with_recipe(settings_of(folder, **options))
    plain = with_recipe(settings_of(folder, fuse=False, **options))
    sam, ours = step(fused, prompt=BOXES)
    all_within_budget(
        ours,
        lambda: step(plain, prompt=BOXES)[1],
        lambda: step(plain, torch.float64, prompt=BOXES)[1],
        torch.float32,
    )
    assert set(samfast.report(sam).blocks.values()) == {"fused"}
    decoder = tuple(f"{part}." for part in TRAINED_DECODER)
    trained = {n for n, p in sam.named_parameters() if p.requires_grad}
    assert all((n.startswith(BLOCKS) and "base" not in n) or n.startswith(decoder) for n in trained)
    assert {n for n, p in sam.named_parameters() if n.startswith(decoder)} <= trained
    layers = {n.split(".attention.")[1].split(".")[0] for n in trained if ".attention." in n}
    own = {"lora": "qkv", "slices": "qv", "conv-lora": "qkv", "decoder": ""}[name]
    assert layers == {f"{letter}_proj" for letter in own}
    assert not any(g is None for g in ours.values())


@pytest.mark.slow_on_cpu
def test_nothing_is_kept_of_a_frozen_encoder(folder, shared_data, tmp_path, capsys):
    """Whose decoder has a part in the maps."""
    words = ("finetune", "--data", shared_data, "--model", "sam3", "--checkpoint", folder)
    words += ("--method", "decoder", "--no-flips", "--epochs", "1", "--repeats", "1")
    summary = called(capsys, *words, "--overlays", "0", "--output", tmp_path / "out")
    assert summary["val_dice"] >= 0
    told = dry_run(settings_of(folder, method="decoder", flips=False, dry_run=True))
    assert told["embedding_bytes"] is None


@pytest.mark.parametrize("size", [28, 84])
def test_a_folder_at_another_size(folder, size):
    """Runs as a model of that size with the same weights, which has no table of positions."""
    sam = build_sam("sam3", folder, image_size=size)
    told = {"name": "sam3", "image_size": size, "checkpoint": "tracker", "seed": None}
    assert sam.samfast_base == told
    other = tracker(side=size)
    other.load_state_dict(sam.state_dict())
    images = torch.randint(0, 256, (1, 3, size, size), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found, expected = segment(sam, images.byte()), segment(other, images.byte())
    # The same weights at other addresses: products may differ in their last bits.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_transformers(monkeypatch, folder, shared_data, refused):
    monkeypatch.setitem(sys.modules, "transformers", None)
    words = ("finetune", "--data", shared_data, "--model", "sam3", "--checkpoint", folder)
    refused(*words, pattern=r'sam3 needs transformers 5 or newer: pip install "samfast\[hf\]"')


def whole(folder, tmp_path, prefix="tracker_model."):
    """The folder's tracker as all of SAM 3 has it, next to its other parts."""
    own = json.loads((folder / "config.json").read_text())
    own["model_type"] = "sam3_tracker_video"
    path = tmp_path / "whole"
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({"model_type": "sam3_video", "tracker_config": own, "detector_config": {}})
    )
    state = {}
    for name, t in tracker().state_dict().items():
        if name.startswith("vision_encoder.neck."):
            name = name.replace("vision_encoder.neck.", "tracker_neck.")
        elif name.startswith("vision_encoder."):
            name = f"detector_model.{name}"
        else:
            name = f"{prefix}{name}"
        state[name] = t.contiguous()
    state["detector_model.text_projection.weight"] = torch.ones(2, 2)
    state["tracker_model.no_object_pointer"] = torch.ones(1, 32)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return path


def test_the_tracker_of_all_of_sam_3(folder, tmp_path):
    sam = build_sam("sam3", whole(folder, tmp_path))
    theirs = dict(tracker().named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in sam.named_parameters())
    assert len(theirs) == len(list(sam.parameters()))


def test_a_folder_without_its_tracker(folder, tmp_path, shared_data, refused):
    """As transformers 5.23 writes all of SAM 3, whose names it does not read again."""
    path = whole(folder, tmp_path, "tracker_model.tracker_model.")
    words = ("finetune", "--data", shared_data, "--model", "sam3", "--checkpoint", path)
    refused(*words, pattern=r"whole lacks \d+ tensors of the tracker, such as mask_decoder\.")


def changed(folder, tmp_path, config=None, state=None):
    """A copy of the folder with another text of config.json, or other tensors."""
    path = tmp_path / "changed"
    shutil.copytree(folder, path)
    if config is not None:
        (path / "config.json").write_text(config)
    if state is not None:
        save_file(state, path / "model.safetensors", {"format": "pt"})
    return path


KINDS = {
    "sam3": "holds the part of SAM 3 that takes words, .* sam3 needs a Sam3TrackerModel",
    "sam3_tracker_video": "holds the part of SAM 3 that follows objects through videos; sam3 needs",
    "sam": "holds a model of the kind 'sam'; sam3 needs a Sam3TrackerModel",
    "llama": "holds a model of the kind 'llama'; sam3 needs",
}
TEXTS = {
    "{oops": "config.json is not a configuration: Expecting property name",
    "": "config.json is not a configuration: Expecting value",
    "[1]": "config.json is not a configuration: it holds a list",
    "{}": "holds a model of the kind None",
    '{"model_type": ["sam3"]}': r"holds a model of the kind \['sam3'\]",
    **{f'{{"model_type": "{kind}"}}': said for kind, said in KINDS.items()},
}


@pytest.mark.parametrize("text", TEXTS)
def test_folders_of_something_else(folder, tmp_path, shared_data, refused, text):
    path = changed(folder, tmp_path, config=text)
    words = ("finetune", "--data", shared_data, "--model", "sam3", "--checkpoint", path)
    refused(*words, pattern=TEXTS[text])
    refused(*words, "--dry-run", pattern=TEXTS[text])


@pytest.mark.slow_on_cpu
def test_folders_that_lack_something(folder, tmp_path, shared_data, refused):
    def no(path, pattern):
        words = ("finetune", "--data", shared_data, "--model", "sam3", "--checkpoint", path)
        refused(*words, pattern=pattern)

    no(tmp_path / "none", "none does not exist")
    no(shared_data, "data is not a Hugging Face folder: it has no config.json")
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("mask_decoder.conv_s0.weight"))
    weights = folder / "model.safetensors"
    path = changed(folder, tmp_path, state={**state, name: state[name][:2].clone()})
    no(path, r"has mask_decoder.conv_s0.weight of shape \(2, 32, 1, 1\), but its .* \(4, 32, 1, 1")
    save_file({k: t for k, t in state.items() if k != name}, path / weights.name, {"format": "pt"})
    no(path, "changed lacks 1 tensors of the tracker, such as mask_decoder.conv_s0.weight")
    (path / weights.name).write_bytes(weights.read_bytes()[:-100])
    no(path, "changed does not load: .*incomplete metadata")
    (path / weights.name).unlink()
    no(path, "changed does not load: Error no file named model.safetensors")


SIZES = {
    "patch_size": (0, "patch_size of this SAM 3 is 0, not a whole number of at least 1"),
    "num_attention_heads": (5, "hidden_size 32 of this SAM 3 is not a multiple of 4 times its 5"),
    "image_size": ([56, 84], r"expected a square image size, but this model has \(56, 84\)"),
}


@pytest.mark.parametrize("name", SIZES)
def test_configurations_that_do_not_work(folder, tmp_path, shared_data, refused, name):
    config = json.loads((folder / "config.json").read_text())
    value, said = SIZES[name]
    config["vision_config"]["backbone_config"][name] = value
    path = changed(folder, tmp_path, config=json.dumps(config))
    words = ("finetune", "--data", shared_data, "--model", "sam3", "--checkpoint", path)
    refused(*words, pattern=said)


OPTIONS = {
    "size": (("--image-size", "60"), "image size 60 is not a multiple of 28, the side of a window"),
    "large": (("--image-size", "2800000"), "image size 2800000 is above 32768, the largest"),
    "cobot-lora": (("--method", "cobot-lora"), "method cobot-lora needs segment_anything's layers"),
    "adaptformer": (("--method", "adaptformer"), "for sam3 use one of lora, conv-lora, kronecker"),
    "ta-lora": (("--method", "ta-lora"), "method ta-lora is for several tasks"),
    "tasks": (("--tasks", "tasks.yaml"), "sam3 learns one mask per image; leave out --tasks"),
    "random": (("--random-init",), "sam3 cannot be random and from checkpoint .*; give only one"),
    "target": (("--target", "nosuch"), "target 'nosuch' matches no layer in vision_encoder"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_do_not_fit(folder, shared_data, refused, name):
    more, said = OPTIONS[name]
    words = ("finetune", "--data", shared_data, "--model", "sam3", "--checkpoint", folder)
    refused(*words, *more, pattern=said)


def test_nothing_named(shared_data, refused):
    words = ("finetune", "--data", shared_data, "--model", "sam3")
    refused(*words, pattern="sam3 needs a checkpoint .* or random weights")


def profiled(capsys, *more):
    """Exit code and what is printed of a profile of SAM 3."""
    words = "profile --model sam3 --device cpu --batch 1 --steps 1 --skip 2 --json".split()
    code = cli.main([*words, *map(str, more)])
    return code, capsys.readouterr()


@pytest.mark.slow
def test_a_profile_of_the_folder(folder, capsys):
    code, printed = profiled(capsys, "--checkpoint", folder)
    result = json.loads(printed.out)
    assert code == 0 and (result["model"], result["image_size"]) == ("sam3", SIDE)
    assert f"sam.{BLOCKS}1" in {row["name"] for row in result["blocks"]}
    assert result["totals"]["flop"] > 0


def test_profiles_that_do_not_fit(folder, capsys):
    for more, said in (
        (("--compare",), "--compare needs segment_anything's sizes"),
        (("--method", "cobot-lora"), "for sam3 use one of lora, conv-lora, kronecker, decoder"),
        (("--image-size", "60"), "image size 60 is not a multiple of 28"),
    ):
        code, printed = profiled(capsys, "--checkpoint", folder, *more)
        assert code == 2 and said in printed.err and printed.err.count("\n") == 1
        assert printed.out == ""


STEPS = {
    "lora": {},
    "minimal-box": {"memory": "minimal", "prompt": "box", "accumulate": 2},
    "point": {"prompt": "point"},
    "stock": {"fuse": False},
    "chunk": {"batch_size": 2, "decoder_chunk": 1, "prompt": "box"},
    "conv-lora": {"method": "conv-lora"},
    "decoder": {"method": "decoder"},
    "kronecker": {"method": "kronecker", "memory": "balanced"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_peak_of_a_step(folder, name):
    """Within a tenth of what a real step allocates, as of other models."""
    options = {"batch_size": 1, "image_size": 168, **STEPS[name]}
    settings = settings_of(folder, dry_run=True, **options)
    told = dry_run(settings)
    step = MeasuredStep(settings)
    assert told["trained_parameters"] == sum(p.numel() for p in step.parameters)
    measured, total = step.peak(), told["peak_bytes"]["total"]
    assert abs(total - measured) <= 0.1 * measured, f"told {total:,}, measured {measured:,}"


@pytest.mark.slow
def test_a_plan_for_a_card(folder, capsys):
    words = ("finetune", "--model", "sam3", "--checkpoint", folder, "--prompt", "box")
    assert cli.main([str(word) for word in (*words, "--dry-run", "--fit", "12GB")]) == 0
    assert capsys.readouterr().out.startswith("plan for 12 GB: --memory fast --batch-size 2 ")
