# SPDX-License-Identifier: Apache-2.0
"""finetune --dry-run against the same step on real tensors."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samfast
from samfast import cli
from samfast.counters import Living, counting, saved_bytes
from samfast.models import encode, image_size
from samfast.models.architectures import ARCHITECTURES
from samfast.models.prompted import FirstPrompts
from samfast.training import dry_run, loop
from samfast.training.build import attach_method, build_base
from samfast.training.data import padded_images, valid_region
from samfast.training.losses import LOSSES
from samfast.training.many_tasks import tasks_loss
from samfast.training.precision import autocast_dtype, base_dtype
from samfast.training.prompted_data import ObjectBatch
from samfast.training.prompted_objects import objects_loss
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.recipe import with_recipe
from samfast.training.segmenters import Segmenter, TaskSegmenter
from samfast.training.settings import FinetuneSettings
from samfast.training.task_data import TaskBatch
from samfast.training.tasks import read_tasks
from samfast.training.try_out import backend_asked_for

TASKS = """
tasks:
  - {name: classes, kind: semantic, channels: 3}
  - {name: edges, derive: boundary, from: classes, weight: 0.5}
  - {name: slopes, kind: regression, channels: 3, loss: cosine, folder: slopes}
"""
COMMON = {"model": "vit_tiny", "image_size": 112, "batch_size": 1, "dry_run": True}


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    """One with windows and one without are enough."""
    small = dataclasses.replace(ARCHITECTURES["vit_tiny"], depth=2, global_blocks=(1,))
    monkeypatch.setitem(ARCHITECTURES, "vit_tiny", small)


class RealStep:
    """A step as finetune makes it, on the CPU's memory, counted piece by piece."""

    def __init__(self, settings: FinetuneSettings):
        settings = with_recipe(settings)
        cpu = torch.device("cpu")
        dtype = autocast_dtype(settings.precision, cpu)
        base = base_dtype(settings.base_dtype, dtype, cpu)
        self.sam = attach_method(build_base(settings), settings, base)
        self.model = Segmenter(self.sam, dtype, settings.decoder_chunk).train()
        self.criterion = LOSSES[settings.loss]
        side = image_size(self.sam)
        self.images = torch.randint(0, 256, (settings.batch_size, 3, side, side)).byte()
        self.masks = self.images[:, 0] > 200
        self.sizes = torch.full((settings.batch_size, 2), side)
        self.known = [*self.sam.parameters(), *self.sam.buffers()]
        boxes = torch.rand(settings.batch_size, 4).sort().values * side
        self.boxes = boxes if settings.prompt == "box" else None
        self.given = [self.images, self.masks, self.sizes]
        self.given += [] if self.boxes is None else [self.boxes]
        self.known += self.given
        if settings.method == "conv-lora":
            self.loss()  # the first call of experts makes matrices that stay

    def loss(self):
        logits, valid = self.model(self.images, self.sizes, self.boxes)
        return self.criterion(logits, self.masks, valid) + samfast.aux_loss(self.sam)

    def embeddings(self):
        valid = valid_region(self.sizes, image_size(self.sam))
        dtype = self.model.dtype
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return encode(self.sam, padded_images(self.images, valid, self.sam.pixel_mean))

    def saved(self, call):
        saved = saved_bytes(call, self.known)
        return max(saved.hooks, saved.living)


class RealTaskStep(RealStep):
    """Of several tasks, which every image has."""

    def __init__(self, settings: FinetuneSettings):
        settings = with_recipe(settings)
        self.specs = read_tasks(settings.tasks)
        sam = build_base(settings, [spec.task for spec in self.specs])
        self.sam = attach_method(sam, settings)
        self.model = TaskSegmenter(self.sam, torch.float32, settings.decoder_chunk).train()
        count, side = settings.batch_size, image_size(sam)
        images = torch.randint(0, 256, (count, 3, side, side)).byte()
        targets = {
            "classes": torch.randint(0, 3, (count, side, side)),
            "edges": torch.randint(0, 2, (count, side, side)),
            "slopes": torch.randn(count, 3, side, side),
        }
        rows = {name: list(range(count)) for name in targets}
        sizes = torch.full((count, 2), side)
        self.batch = TaskBatch(images, sizes, rows, targets, {})
        self.given = [images, sizes, *targets.values()]
        self.known = [*self.sam.parameters(), *self.sam.buffers(), *self.given]
        self.embeddings()  # the tasks, once set, stay

    def loss(self):
        return tasks_loss(self.model, self.batch, self.specs) + samfast.aux_loss(self.sam)

    def embeddings(self):
        valid = valid_region(self.batch.sizes, image_size(self.sam))
        images = padded_images(self.batch.images, valid, self.sam.pixel_mean)
        return self.sam.encode_for(images, dict.fromkeys(range(len(self.specs))))


class RealObjectStep(RealStep):
    """Single objects with prompts, in rounds."""

    def __init__(self, settings):
        settings = with_recipe(settings)
        self.settings = settings
        self.sam = attach_method(build_base(settings), settings)
        self.model = PromptedSegmenter(self.sam, torch.float32, settings.decoder_chunk).train()
        count, side = settings.batch_size, image_size(self.sam)
        images = torch.randint(0, 256, (count, 3, side, side)).byte()
        total = count * settings.objects
        masks = torch.rand(total, side, side) < 0.3
        corners = torch.rand(total, 2, 2).sort(1).values.flatten(1) * side
        first = FirstPrompts(corners, torch.arange(total) % 2 == 0)
        draws = torch.rand(total, settings.prompt_rounds - 1, dtype=torch.float64)
        sizes, counts = torch.full((count, 2), side), (settings.objects,) * count
        self.batch = ObjectBatch(images, sizes, counts, masks, first, draws)
        self.given = [images, sizes, masks, *first, draws]
        self.known = [*self.sam.parameters(), *self.sam.buffers(), *self.given]

    def loss(self):
        loss = objects_loss(self.model, self.batch, LOSSES[self.settings.loss])
        return loss + samfast.aux_loss(self.sam)

    def embeddings(self):
        return self.model.embeddings(self.batch.images, self.batch.sizes)


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def tasks_file(folder):
    path = folder / "tasks.yaml"
    path.write_text(TASKS)
    return path


ALL = ("qkv", "proj", "lin1", "lin2")
OBJECTS = {"masks": "instances", "prompt": "mixed", "prompt_rounds": 2, "objects": 3}
CASES = {
    "minimal": {"memory": "minimal", "decoder_chunk": 1, "batch_size": 2},
}
MORE = {
    "conv-lora": {"method": "conv-lora", "dropout": 0.25},
    "lora": {},
    "box": {"prompt": "box"},
    "cobot-lora": {"method": "cobot-lora", "prompt": "box"},
    "adaptformer": {"method": "adaptformer"},
    "cobot-adaptformer": {"method": "cobot-adaptformer"},
    "kronecker": {"method": "kronecker"},
    "stock": {"fuse": False},
    "decoder": {"method": "decoder"},
    "balanced": {"memory": "balanced", "loss": "structure", "target": ALL},
    "reference": {"backend": "reference"},
    "ta-lora": {"tasks": TASKS, "method": "ta-lora", "image_size": 64},
    "tasks-lora": {"tasks": TASKS, "batch_size": 2, "decoder_chunk": 2, "memory": "minimal"},
    "tasks-penalty": {"tasks": TASKS, "method": "ta-lora", "batch_size": 2, "orthogonality": 1.0},
    "objects": {**OBJECTS, "batch_size": 2, "decoder_chunk": 2},
    "objects-memory": {**OBJECTS, "memory": "minimal"},
    "conv-lora-stock": {"method": "conv-lora", "depthwise": True, "fuse": False},
}
quick = [pytest.param(options, id=name) for name, options in CASES.items()]
slow = [pytest.param(o, id=name, marks=pytest.mark.slow) for name, o in MORE.items()]


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("options", quick + slow)
def test_equals_a_real_step(monkeypatch, tmp_path, options):
    """And leaves nothing behind: no setting, no random number, no fake tensor in a cache."""
    options, kind = dict(options), RealStep
    if "tasks" in options:
        kind, options["tasks"] = RealTaskStep, tasks_file(tmp_path)
    if "masks" in options:
        kind = RealObjectStep
    settings = FinetuneSettings(**{**COMMON, **options})
    monkeypatch.delenv("SAMFAST_BACKEND", raising=False)
    state = torch.get_rng_state()
    result = dry_run.dry_run(settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert "SAMFAST_BACKEND" not in os.environ
    monkeypatch.setenv("SAMFAST_BACKEND", options.get("backend", "torch"))
    real = kind(settings)
    assert result["saved_bytes"]["encoder"] == real.saved(real.embeddings)
    assert result["saved_bytes"]["step"] == real.saved(real.loss)
    trained = [p for _, p in samfast.trainable_parameters(real.sam)]
    with Living(real.known) as living:
        with counting(dry_run.KERNELS) as forward:
            loss = real.loss()
        with counting(dry_run.KERNELS) as backward:
            loss.backward()
    assert result["flop"] == {"forward": forward.flops, "backward": backward.flops}
    made = [p.grad for p in trained if p.grad is not None]
    most, of_gradients = living.worst(made)
    updating = bytes_of(made)
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    state = [v for values in optimizer.state_dict()["state"].values() for v in values.values()]
    assert result["trained_parameters"] == sum(p.numel() for p in trained)
    peak = result["peak_bytes"]
    assert peak["gradients"] == (of_gradients if most > updating else updating)
    assert peak["optimizer"] == bytes_of(state)
    assert peak["model"] == bytes_of([*real.sam.parameters(), *real.sam.buffers()])
    assert peak["saved"] == min(result["saved_bytes"]["step"], max(most - of_gradients, 0))
    assert peak["batch"] == peak["next_batch"] == bytes_of(real.given)
    assert peak["gradients"] + peak["saved"] + peak["transient"] == max(most, updating)
    assert peak["total"] == sum(size for name, size in peak.items() if name != "total")


def test_trying_a_backend_takes_no_random_number():
    state, cpu = torch.get_rng_state(), torch.device("cpu")
    with backend_asked_for("torch", samfast.Lora(rank=2), True, cpu, torch.float32):
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("base", [pytest.param("auto", marks=pytest.mark.slow), "bfloat16"])
def test_casts_as_autocast_does(monkeypatch, base):
    """To a few numbers a norm: torch's fake LayerNorm has another dtype for its statistics."""
    settings = FinetuneSettings(**COMMON, method="conv-lora", precision="bf16", base_dtype=base)
    result = dry_run.dry_run(settings)
    monkeypatch.setenv("SAMFAST_BACKEND", "torch")
    real = RealStep(settings)
    for part, call in (("encoder", real.embeddings), ("step", real.loss)):
        difference = real.saved(call) - result["saved_bytes"][part]
        assert abs(difference) <= 1e-4 * result["saved_bytes"][part]
    assert result["peak_bytes"]["model"] == bytes_of([*real.sam.parameters(), *real.sam.buffers()])
    assert (result["precision"], result["base_dtype"]) == (
        "bfloat16",
        base.replace("auto", "float32"),
    )


@pytest.mark.slow
def test_options_save_what_they_promise():
    def saved(memory, **options):
        options = {**COMMON, "batch_size": 4, "memory": memory, **options}
        return dry_run.dry_run(FinetuneSettings(**options))["saved_bytes"]

    whole, balanced, minimal = map(saved, ("fast", "balanced", "minimal"))
    width = 4 * 192 * 49 * 4 * 2  # bytes of a number, features, tokens, images, blocks
    assert 1 <= (whole["encoder"] - balanced["encoder"]) / (7 * width) < 1.05
    assert 1 <= (balanced["encoder"] - minimal["encoder"]) / (2 * width) < 1.05
    chunked = saved("fast", decoder_chunk=1)
    assert whole["encoder"] == chunked["encoder"]
    assert chunked["step"] - chunked["encoder"] < 0.4 * (whole["step"] - whole["encoder"])


@pytest.mark.slow_on_cpu
def test_the_command_needs_no_file_and_writes_none(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--model", "vit_tiny", "--image-size", 64, "--batch-size", 3, "--rank", 2)
    options += ("--memory", "balanced", "--decoder-chunk", 2, "--target", "qkv", "lin1")
    absent = ("--data", tmp_path / "none", "--checkpoint", "none.pth")
    assert cli.main(["finetune", "--dry-run", *map(str, (*options, *absent)), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert result["objects_per_image"] == 1 and result["device"] in ("cpu", "cuda")
    given = ("model", "image_size", "batch_size", "memory", "decoder_chunk")
    assert [result[name] for name in given] == ["vit_tiny", 64, 3, "balanced", 2]
    text = dry_run.text(result)
    assert f"{result['trained_parameters']:,}" in text and "memory balanced" in text
    assert all(word in text for word in ("peak memory", "transient", "FLOP backward"))
    monkeypatch.setattr(loop, "dry_run", lambda settings: result)
    assert cli.main(["finetune", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"{text}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow_on_cpu
def test_boxes_are_counted():
    result = dry_run.dry_run(FinetuneSettings(**COMMON, prompt="box"))
    image, mask, size, box = 3 * 112 * 112, 112 * 112, 2 * 8, 4 * 4
    assert result["peak_bytes"]["batch"] == image + mask + size + box
    assert result["prompt"] == "box" and "1 object per image and its box" in dry_run.text(result)


@pytest.mark.slow_on_cpu("kronecker")
@pytest.mark.slow_on_cpu("cobot-adaptformer")
@pytest.mark.parametrize(
    "method", [pytest.param("cobot-lora", marks=pytest.mark.slow), "cobot-adaptformer", "kronecker"]
)
def test_the_command_knows_each_method(method, capsys):
    arguments = ["--model", "vit_tiny", "--image-size", "64", "--method", method, "--json"]
    assert cli.main(["finetune", "--dry-run", "--prompt", "box", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    settings = FinetuneSettings(model="vit_tiny", image_size=64, method=method)
    sam = attach_method(build_base(settings), settings)
    assert result["trained_parameters"] == samfast.report(sam).trained_parameters
    assert (result["method"], result["prompt"]) == (method, "box")
    assert dry_run.text(result).startswith(f"vit_tiny at 64 pixels, {method}, batches of 2, ")


@pytest.mark.slow
def test_the_command_counts_tasks(capsys, tmp_path):
    """Without a data folder."""
    arguments = ["--model", "vit_tiny", "--image-size", "64", "--batch-size", "1", "--json"]
    arguments += ["--tasks", str(tasks_file(tmp_path)), "--method", "ta-lora"]
    assert cli.main(["finetune", "--dry-run", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tasks"] == {"classes": 3, "edges": 1, "slopes": 3}
    assert result["objects_per_image"] == 7
    assert result["peak_bytes"]["batch"] == 64 * 64 * (3 + 2 * 8 + 3 * 4) + 2 * 8
    settings = FinetuneSettings(model="vit_tiny", image_size=64, method="ta-lora")
    tasks = [spec.task for spec in read_tasks(tmp_path / "tasks.yaml")]
    sam = attach_method(build_base(settings, tasks), settings)
    assert result["trained_parameters"] == samfast.report(sam).trained_parameters
    assert "channels of tasks: classes 3, edges 1, slopes 3" in dry_run.text(result)
    assert list(tmp_path.iterdir()) == [tmp_path / "tasks.yaml"]


def test_wrong_settings_are_refused(refused):
    for options, pattern in (
        (("--model", "vit_bb"), "unknown model 'vit_bb'"),
        (("--model", "vit_tiny", "--image-size", 100), "image size 100 is not"),
        (("--model", "vit_tiny", "--rank", 0), "rank is 0"),
        (("--model", "vit_tiny", "--tasks", "no.yaml"), "tasks file no.yaml does not exist"),
        (("--model", "vit_tiny", "--method", "ta-lora"), "name their file with --tasks"),
        (("--model", "vit_tiny", "--target", "qvk"), "target 'qvk' matches no layer"),
        (("--model", "vit_tiny", "--memory", "fast", "--no-fuse"), "memory is fast, which only"),
    ):
        refused("finetune", "--dry-run", *options, pattern=pattern)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_vit_h_takes_seconds_and_little_memory():
    """Its weights alone are 2.4 GiB. It keeps 10 * D numbers a token and block."""
    code = "import sys; from pathlib import Path; from samfast.cli import main;"
    code += "code = main(sys.argv[1:]); rows = Path('/proc/self/status').read_text().splitlines();"
    # resource.getrusage would count what the tests held before this process began.
    code += "print(*(row.split()[1] for row in rows if row.startswith('VmHWM'))); sys.exit(code)"
    arguments = ["finetune", "--dry-run", "--model", "vit_h", "--random-init", "--batch-size", "1"]
    command = [sys.executable, "-c", code, *arguments, "--target", "qkv", "proj", "lin1", "lin2"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    text, _, peak = done.stdout.strip().rpartition("\n")
    assert int(peak) < 2**20  # KiB
    result = json.loads(text)
    floor = 4 * 10 * 1280 * 4096 * 32
    assert floor < result["saved_bytes"]["encoder"] < 1.05 * floor
    assert 11.9e12 < sum(result["flop"].values()) < 12.5e12
