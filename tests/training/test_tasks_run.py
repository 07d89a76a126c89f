# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning several tasks end to end: outputs, reload, evaluate, predict, what is refused."""

import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from budgets import keep
from conftest import rectangle
from PIL import Image
from stock_runs import by_reference

import samfast
from samfast import cli
from samfast.kernels._common.budget import Budget
from samfast.models import MultiTaskSam, Task, build_sam
from samfast.modules.adapter_files import read_adapter_config
from samfast.training import predict
from samfast.training.loop import finetune
from samfast.training.predict import load_adapted
from samfast.training.score import score
from samfast.training.settings import EvaluateSettings, FinetuneSettings

TASKS = """
tasks:
  - {name: classes, kind: semantic, channels: 3, ignore: 9, classes: [rest, box, strip]}
  - {name: edges, derive: boundary, from: classes, weight: 0.5}
  - {name: depth, kind: regression, folder: depth, scale: 0.1}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six pictures of a rectangle with its classes; half of them with a depth too."""
    folder = tmp_path_factory.mktemp("tasks")
    for kind in ("images", "masks", "depth"):
        (folder / kind).mkdir()
    for i in range(6):
        image, mask = rectangle(i, 48 + 4 * i, 64)
        Image.fromarray(image).save(folder / "images" / f"p{i}.png")
        labels = mask.astype(np.uint8)
        labels[-1, :5] = 9
        labels[-4:, 20:] = 2
        Image.fromarray(labels).save(folder / "masks" / f"p{i}.png")
        if i % 2:
            depth = np.where(mask, np.float32(10), np.float32(30))
            Image.fromarray(depth).save(folder / "depth" / f"p{i}.tif")
    (folder / "tasks.yaml").write_text(TASKS)
    return folder


def settings_for(data, output, **options) -> FinetuneSettings:
    defaults = {
        "model": "vit_tiny",
        "image_size": 64,
        "epochs": 1,
        "repeats": 1,
        "rank": 4,
        "backend": "torch",
        "overlays": 1,
    }
    return FinetuneSettings(
        data=data, tasks=data / "tasks.yaml", output=output, **{**defaults, **options}
    )


@pytest.fixture(
    scope="module", params=[pytest.param("lora", marks=pytest.mark.slow_on_cpu), "ta-lora"]
)
def run(request, data, tmp_path_factory):
    """A finished run of two steps."""
    output = tmp_path_factory.mktemp("run") / "out"
    settings = settings_for(data, output, method=request.param)
    return settings, finetune(settings)


one_method = pytest.mark.parametrize("run", ["ta-lora"], indirect=True)


def test_a_run_leaves_all_its_results(run):
    settings, summary = run
    with (settings.output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["classes_miou", "classes_accuracy", "edges_dice", "edges_iou", "depth_abs"]
    assert list(rows[0]) == [
        *("epoch", "step", "train_loss", "val_loss", "val_score"),
        *(f"val_{name}" for name in (*names, "depth_rel")),
        *("images_per_second", "peak_memory_mib", "lr"),
    ]
    assert rows[0]["step"] == "2" == str(summary["steps"])
    assert all(np.isfinite(float(value)) for value in rows[0].values())
    assert json.loads((settings.output / "summary.json").read_text()) == summary
    for task, own in summary["tasks"].items():
        for name, value in own.items():
            assert value == float(rows[0][f"val_{task}_{name}"])
    assert set(summary["best_constant"]) == {"classes", "edges", "depth"}
    assert Image.open(settings.output / "curves.png").width > 500
    panels = sorted(path.name for path in (settings.output / "overlays").iterdir())
    assert {name.split("-")[1] for name in panels} >= {"classes.png", "edges.png"}
    with (settings.output / "classes.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["rest", "box", "strip"]
    with (settings.output / "scores.csv").open() as file:
        assert {row["task"] for row in csv.DictReader(file)} >= {"classes", "edges"}


def test_the_reloaded_adapter_predicts_the_same_bits(run, data):
    settings, _ = run
    adapter = settings.output / "adapter"
    record = read_adapter_config(adapter / "best")
    assert record["head"] == "multi-task"
    assert [task["name"] for task in record["classes"]] == ["classes", "edges", "depth"]
    assert [task["name"] for task in record["extra"]["tasks"]] == ["classes", "edges", "depth"]
    model = load_adapted(adapter)
    assert isinstance(model, MultiTaskSam)
    fresh = MultiTaskSam(build_sam("vit_tiny", image_size=64, seed=settings.seed), model.tasks)
    samfast.fuse(samfast.load_adapter(fresh, adapter / "last")).eval()
    images = torch.randint(0, 256, (2, 3, 60, 64), dtype=torch.uint8)
    with torch.no_grad():
        mine, theirs = model(images), fresh(images)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(mine["classes"][:, 0], mine["classes"][:, 1])  # they were trained


@pytest.mark.slow_on_cpu("ta-lora")
@one_method
def test_evaluate_scores_as_the_run_did(run, data, tmp_path):
    settings, summary = run
    held = json.loads((settings.output / "settings.json").read_text())["val"]
    only = tmp_path / "held"
    for kind in ("images", "masks", "depth"):
        (only / kind).mkdir(parents=True)
        for path in (data / kind).iterdir():
            if path.stem in held:
                (only / kind / path.name).symlink_to(path)
    options = {"adapter": settings.output / "adapter", "data": only, "backend": "torch"}
    result = score(EvaluateSettings(**options, batch_size=1, output=tmp_path / "panels"))
    for task, own in summary["tasks"].items():
        assert result["tasks"][task] == pytest.approx(own, rel=1e-4, abs=1e-4)
    assert result["best_constant"] == summary["best_constant"]
    assert result["images"] == len(held)
    assert len(list((tmp_path / "panels").glob("*.png"))) == 2 * len(held) + 1
    assert len(list((tmp_path / "panels").glob("*.csv"))) == 2
    assert len(result["per_image"]) == 2 * len(held) + 1
    assert [row["name"] for row in result["per_class"]] == ["rest", "box", "strip"]
    assert result["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-4)
    alone = score(EvaluateSettings(**options, task="edges"))
    assert list(alone["tasks"]) == ["edges"]
    assert alone["tasks"]["edges"] == pytest.approx(summary["tasks"]["edges"], rel=1e-4, abs=1e-4)


@one_method
def test_evaluate_prints_a_table(run, data, capsys):
    settings, _ = run
    arguments = ["evaluate", "--adapter", str(settings.output / "adapter"), "--data", str(data)]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["classes", "mIoU"],
        ["edges", "Dice"],
        ["depth", "abs"],
    ]
    assert cli.main([*arguments, "--task", "depth", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["tasks"]) == ["depth"]
    assert cli.main([*arguments, "--task", "dept"]) == 2
    assert "has no task 'dept'; did you mean 'depth'?" in capsys.readouterr().err


@pytest.mark.slow_on_cpu("ta-lora")
@one_method
def test_predict_writes_classes_and_values(run, data, tmp_path, capsys, monkeypatch):
    settings, _ = run
    adapter = str(settings.output / "adapter")
    photo = data / "images" / "p1.png"
    arguments = ["predict", "--adapter", adapter, str(photo), "--output"]
    assert cli.main([*arguments, str(tmp_path / "all")]) == 0
    assert "3 masks and overlays" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == [
        "p1_classes.png",
        "p1_classes_overlay.png",
        "p1_depth.tif",
        "p1_depth_overlay.png",
        "p1_edges.png",
        "p1_edges_overlay.png",
    ]
    height, width = np.asarray(Image.open(photo)).shape[:2]
    classes = np.asarray(Image.open(tmp_path / "all" / "p1_classes.png"))
    assert classes.shape == (height, width) and classes.max() <= 2
    depth = np.asarray(Image.open(tmp_path / "all" / "p1_depth.tif"))
    assert depth.shape == (height, width) and depth.dtype == np.float32
    assert set(np.unique(Image.open(tmp_path / "all" / "p1_edges.png"))) <= {0, 255}
    assert cli.main([*arguments, str(tmp_path / "one"), "--task", "depth"]) == 0
    assert len(list((tmp_path / "one").iterdir())) == 2
    one = np.asarray(Image.open(tmp_path / "one" / "p1_depth.tif"))

    def predicted(dtype):
        monkeypatch.setattr(
            predict, "load_adapted", lambda *a, **k: load_adapted(*a, **k).to(dtype)
        )
        folder = tempfile.mkdtemp(dir=tmp_path)
        assert cli.main([*arguments, folder, "--task", "depth"]) == 0
        made = torch.tensor(np.asarray(Image.open(Path(folder) / "p1_depth.tif")))
        return made.to(dtype)  # the file holds float32

    # Not the same bits: all tasks run as one batch, and products of other sizes round differently.
    stock, exact = (by_reference(predicted, dtype) for dtype in (torch.float32, torch.float64))
    budget = Budget(stock, exact, torch.float32)
    for found in (one, depth):
        keep(budget, [torch.tensor(found)])


@one_method
def test_two_steps_train_every_task(run):
    """Decoders, embeddings, norms and adapters have moved."""
    settings, _ = run
    trained = load_adapted(settings.output / "adapter").state_dict()
    start = MultiTaskSam(
        build_sam("vit_tiny", image_size=64, seed=settings.seed),
        [Task("classes", "semantic", 3), Task("edges"), Task("depth", "regression")],
    )
    for name in start.trained_parts():
        before = {n: v for n, v in start.state_dict().items() if n.startswith(name)}
        assert before and any(not torch.equal(v, trained[n]) for n, v in before.items()), name


@pytest.fixture(scope="module")
def one_mask(shared_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "out"
    options = {"model": "vit_tiny", "image_size": 64, "epochs": 1, "repeats": 1}
    return output, finetune(FinetuneSettings(data=shared_data, output=output, **options))


@pytest.mark.slow_on_cpu
def test_evaluate_of_one_mask(one_mask, shared_data, tmp_path, capsys):
    output, summary = one_mask
    held = json.loads((output / "settings.json").read_text())["val"]
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / part / kind).mkdir(parents=True)
            for path in (shared_data / kind).iterdir():
                if (path.stem in held) == (part == "val"):
                    (tmp_path / part / kind / path.name).symlink_to(path)
    result = score(EvaluateSettings(adapter=output / "adapter", data=tmp_path))
    for name in ("val_dice", "val_iou", "all_foreground_dice"):
        assert result[name] == pytest.approx(summary[name], rel=1e-4)
    arguments = ["--adapter", str(output / "adapter"), "--task", "depth"]
    for command in (
        ["evaluate", "--data", tmp_path],
        ["predict", shared_data / "images"],
    ):
        assert cli.main([*map(str, command), *arguments]) == 2
        assert "has one mask and no tasks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (
            ("--prompt", "box"),
            "prompt is box, but several tasks take no prompts; leave out --prompt",
        ),
        (("--loss", "structure"), "loss is an option for one mask; .* set it for each task in"),
        (("--foreground", "1"), "foreground is an option for one mask"),
        (("--method", "lora", "--orthogonality", "1"), "orthogonality is 1.0, but method lora has"),
        (("--method", "ta-lora", "--target", "proj"), "ta-lora adapts q, k and v of every block"),
        (("--method", "ta-lora", "--rank", "0"), "it must be three whole numbers|rank"),
    ],
)
def test_refused(refused, data, arguments, pattern):
    given = ("--data", data, "--tasks", data / "tasks.yaml", "--model", "vit_tiny")
    refused("finetune", *given, *arguments, pattern=pattern)


def test_refused_without_tasks(refused, data):
    given = ("finetune", "--data", data, "--model", "vit_tiny")
    refused(*given, "--method", "ta-lora", pattern="ta-lora is for several tasks; .* with --tasks")
    refused(*given, "--tasks", data / "no.yaml", pattern=r"no\.yaml does not exist")


def test_labels_outside_the_range_are_refused(refused, data, tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text("tasks:\n  - {name: a, kind: semantic, channels: 2, ignore: 9}\n")
    pattern = r"masks/p\d.png holds the value 2, but the classes of task a are 0 to 1 \(or 9, 255"
    given = ("--data", data, "--tasks", path, "--model", "vit_tiny", "--image-size", 64)
    refused("finetune", *given, pattern=pattern)
