# SPDX-License-Identifier: Apache-2.0
"""``evaluate --automatic``: the generator's objects, scored next to a run's own."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import samfast
from samfast import cli
from samfast.models import build_sam
from samfast.training import automatic_scores
from samfast.training.automatic_scores import with_prompts
from samfast.training.build import for_tasks
from samfast.training.chosen_tasks import INSTANCES
from samfast.training.predict import load_adapted

SIDE = 64
TINY = ["--model", "vit_tiny", "--image-size", SIDE, "--epochs", 1, "--repeats", 1, "--overlays", 0]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    draw = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for i in range(3):
        labels = np.zeros((64, 72), np.uint8)
        for n, y in enumerate((4, 24, 44), start=1):
            labels[y : y + 14, 10 + 4 * i : 50] = n
        grey = draw.integers(0, 60, labels.shape) + 120 * (labels > 0)
        Image.fromarray(grey.astype(np.uint8)).save(folder / "images" / f"c{i}.png")
        Image.fromarray(labels).save(folder / "masks" / f"c{i}.png")
    return folder


def command(*words):
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def run(cells, tmp_path_factory):
    """A run for each kind of mask."""
    made = {}

    def run_of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("runs") / kind
            options = {
                "instances": ["--masks", "instances", "--method", "decoder"],
                "points": ["--masks", "instances", "--prompt", "point"],
                "any": ["--foreground", "any"],
                "values": ["--foreground", 1, 2],
            }[kind]
            words = ["finetune", "--data", cells, *TINY, *options, "--output", made[kind]]
            assert command(*words) == 0
        return made[kind]

    return run_of


@pytest.mark.slow_on_cpu(but=["instances"])
@pytest.mark.parametrize("kind", ["instances", "points", "any"])
def test_both_ways_are_in_one_table(cells, run, kind, tmp_path, capsys, monkeypatch):
    """Of three images, the generator finds two objects of each and one that is none."""
    seen = []

    def found(sam, image, **options):
        seen.append((image.shape, options))
        labels = np.zeros(image.shape[:2], np.int32)
        i = len(seen) - 1
        for n, y in enumerate((4, 24), start=1):
            labels[y : y + 14, 10 + 4 * i : 50] = n
        labels[:, 60:] = 9
        return labels

    adapter = run(kind)
    monkeypatch.setattr(automatic_scores, "automatic_objects", found)
    words = ["evaluate", "--data", cells, "--adapter", adapter, "--automatic"]
    words += ["--points-per-side", 4, "--output", tmp_path]
    capsys.readouterr()
    assert command(*words, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["automatic"] == {"ap50": 0.5, "pq": pytest.approx(6 / (6 + 1.5 + 1.5))}
    assert seen[0] == ((64, 72, 3), {"points_per_batch": 64, "points_per_side": 4})
    own = {"instances": "val_ap50", "points": "val_miou", "any": "val_dice"}[kind]
    assert 0 <= result[own] <= 1
    rows = [row for row in result["per_image"] if row.get("task") == "automatic"]
    assert [(r["image"], r["found"], r["added"], r["missed"]) for r in rows] == [
        (f"c{i}", 2, 1, 1) for i in range(3)
    ]
    with (tmp_path / "scores.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["ap50"] for row in table if row["task"] == "automatic"] == ["0.5"] * 3
    if kind == "instances":
        assert len([row for row in table if row["task"] == "objects"]) == 3
    assert {f"c{i}-automatic.png" for i in range(3)} <= {p.name for p in tmp_path.iterdir()}
    seen.clear()
    assert command(*words) == 0
    assert "automatic  AP50 0.5000 PQ 0.6667" in capsys.readouterr().out


def test_points_prompt_the_adapted_encoder_of_several_tasks(run):
    """With the decoder of the model that was adapted, as it was."""
    base = build_sam("vit_tiny", image_size=SIDE, seed=0)
    adapted = load_adapted(run("instances"))
    encoder = adapted.image_encoder
    made = with_prompts(adapted, lambda: base)
    assert made.image_encoder is encoder and made is base
    assert with_prompts(made, lambda: 1 / 0) is made


def test_an_encoder_that_depends_on_the_task_is_refused():
    sam = for_tasks(build_sam("vit_tiny", image_size=SIDE, seed=0), [s.task for s in INSTANCES])
    samfast.attach(sam, samfast.TaLora(tasks=3, ranks=(2, 2, 2)), train=sam.trained_parts())
    with pytest.raises(ValueError, match="encoder needs a task"):
        with_prompts(sam, lambda: 1 / 0)


@pytest.mark.slow_on_cpu
def test_the_generator_runs_on_every_kind(cells, run, capsys):
    for kind in ("instances", "points"):
        words = ["evaluate", "--data", cells, "--adapter", run(kind), "--automatic", "--json"]
        words += ["--points-per-side", 4, "--pred-iou-thresh", -9, "--stability-score-thresh", 0]
        capsys.readouterr()
        assert command(*words) == 0
        assert set(json.loads(capsys.readouterr().out)["automatic"]) == {"ap50", "pq"}
    assert torch.is_grad_enabled()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("values", ["--automatic"], "masks that may not tell objects apart; leave out"),
        ("instances", ["--automatic", "--task", "depth"], "or --task names another"),
        ("instances", ["--points-per-side", 4], "but there is no grid; give --automatic"),
        ("points", ["--tile", 64], "needs prompts, which are for whole images; leave out --tile"),
    ],
    ids=str,
)
def test_what_does_not_fit(cells, run, refused, kind, options, sentence):
    words = ["evaluate", "--data", cells, "--adapter", run(kind), *options]
    refused(*words, pattern=sentence)
