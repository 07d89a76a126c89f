# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning end to end on six small pictures: outputs, reload, repetition, interruption."""

import csv
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

import samfast
from samfast import cli
from samfast.modules.adapter_files import read_adapter_config
from samfast.training import loop
from samfast.training.build import attach_method, build_base
from samfast.training.evaluate import evaluate, validation_loader
from samfast.training.folders import load_split
from samfast.training.images import read_image, read_mask
from samfast.training.loop import finetune
from samfast.training.losses import LOSSES
from samfast.training.metrics import ForegroundScores, all_foreground_scores
from samfast.training.predict import load_adapted
from samfast.training.records import COLUMNS
from samfast.training.run import _repeats
from samfast.training.schedules import _factor
from samfast.training.segmenters import Segmenter
from samfast.training.settings import FinetuneSettings

VAL_FRACTION = 0.34  # two of six


def settings_for(data: Path, output: Path, **options) -> FinetuneSettings:
    defaults = {"model": "vit_tiny", "image_size": 64, "epochs": 2, "repeats": 1, "lr": 3e-3}
    return FinetuneSettings(data=data, output=output, **{**defaults, **options})


def holds(panel: np.ndarray, image: np.ndarray) -> bool:
    """Whether the image lies somewhere in the panel, pixel for pixel."""
    windows = sliding_window_view(panel, image.shape).squeeze(2)
    return bool((windows == image).all((2, 3, 4)).any())


def rows_of(output: Path) -> list[dict]:
    with (output / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(shared_data, tmp_path_factory):
    """One finished run: settings and summary."""
    output = tmp_path_factory.mktemp("run") / "out"
    settings = settings_for(shared_data, output, val_fraction=VAL_FRACTION, batch_size=1)
    return settings, finetune(settings)


def test_a_run_leaves_all_its_results(run):
    settings, summary = run
    output = settings.output
    assert sorted(p.name for p in output.iterdir()) == [
        "adapter",
        "curves.png",
        "metrics.csv",
        "overlays",
        "scores.csv",
        "settings.json",
        "state",
        "summary.json",
        "tensorboard",
    ]
    rows = rows_of(output)
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "4"), ("2", "8")]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert all(float(row["peak_memory_mib"]) > 0 for row in rows)
    assert json.loads((output / "summary.json").read_text()) == summary
    assert 0.1 < summary["val_dice"] == max(float(row["val_dice"]) for row in rows)
    saved = json.loads((output / "settings.json").read_text())
    split = load_split(settings.data, val_fraction=VAL_FRACTION)
    assert saved["val"] == [p.stem for p in split.val] and saved["model"] == "vit_tiny"
    assert Image.open(output / "curves.png").width > 500
    assert any((output / "tensorboard").iterdir())
    with (output / "scores.csv").open() as file:
        own = {row["image"]: row for row in csv.DictReader(file)}
    assert set(own) == {pair.stem for pair in split.val} and set(own[split.val[0].stem]) == {
        *("image", "dice", "iou")
    }
    for pair in split.val:
        panel = np.asarray(Image.open(output / "overlays" / f"{pair.stem}.png"))
        assert holds(panel, read_image(pair.image))


def test_the_loss_falls_and_every_trained_tensor_moves(run):
    settings, _ = run
    rows = rows_of(settings.output)
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    before = build_base(settings)
    loop.seed_everything(settings.seed)
    attach_method(before, settings)
    after = load_adapted(settings.output / "adapter" / "last").state_dict()
    moved = {n: not torch.equal(p, after[n]) for n, p in samfast.trainable_parameters(before)}
    assert sum("lora_" in name for name in moved) == 12
    assert all(moved.values()), [name for name, did in moved.items() if not did]
    frozen = [n for n, p in before.named_parameters() if not p.requires_grad]
    state = before.state_dict()
    assert frozen and all(torch.equal(state[n], after[n]) for n in frozen)


def test_the_baseline_is_that_of_the_validation_masks(run):
    settings, summary = run
    pairs = load_split(settings.data, val_fraction=VAL_FRACTION).val
    truths = [torch.from_numpy(read_mask(pair.mask) > 0) for pair in pairs]
    expected = all_foreground_scores(truths)
    assert (summary["all_foreground_dice"], summary["all_foreground_iou"]) == expected


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_loaded_adapter_scores_exactly_what_was_written(run, which):
    settings, summary = run
    folder = settings.output / "adapter" / which
    record = read_adapter_config(folder)
    model = Segmenter(load_adapted(folder))
    pairs = load_split(settings.data, val_fraction=VAL_FRACTION).val
    scores = evaluate(model, validation_loader(pairs, 64, settings.batch_size))
    epoch = summary["best_epoch"] if which == "best" else settings.epochs
    row = rows_of(settings.output)[epoch - 1]
    assert scores == (float(row["val_dice"]), float(row["val_iou"]))
    assert record["extra"]["epoch"] == epoch and record["extra"]["val_dice"] == scores[0]
    assert record["extra"]["val_loss"] == float(row["val_loss"])
    assert record["extra"]["loss"] == "bce-dice"


def test_predict_writes_masks_that_score_the_same(run, tmp_path, capsys):
    settings, summary = run
    pairs = load_split(settings.data, val_fraction=VAL_FRACTION).val
    adapter = settings.output / "adapter" / "best"
    arguments = ["predict", *(str(p.image) for p in pairs), "--adapter", str(adapter)]
    arguments += ["--output", str(tmp_path / "out"), "--batch-size", "2"]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    scores = ForegroundScores()
    for pair, written in zip(pairs, result["images"], strict=True):
        mask = np.asarray(Image.open(written["mask"]))
        assert set(np.unique(mask)) <= {0, 255}
        assert written["foreground"] == (mask > 0).mean()
        assert np.asarray(Image.open(written["overlay"])).shape == read_image(pair.image).shape
        truth = torch.from_numpy(read_mask(pair.mask) > 0)
        scores.update(torch.from_numpy(mask > 0), truth)
    assert scores.compute() == (summary["val_dice"], summary["val_iou"])


@pytest.mark.slow_on_cpu
def test_two_runs_with_one_seed_are_equal(run, tmp_path):
    settings, _ = run
    finetune(replace(settings, output=tmp_path / "again"))
    timing = ("images_per_second", "peak_memory_mib")

    def figures(output):
        return [{k: v for k, v in row.items() if k not in timing} for row in rows_of(output)]

    def tensors(output):
        return load_adapted(output / "adapter" / "last").state_dict()

    assert figures(tmp_path / "again") == figures(settings.output)
    again, first = tensors(tmp_path / "again"), tensors(settings.output)
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.slow_on_cpu
def test_decoder_alone_trains_no_adapter(shared_data, tmp_path):
    settings = settings_for(shared_data, tmp_path / "out", method="decoder", epochs=1)
    summary = finetune(settings)
    adapted = load_adapted(settings.output / "adapter" / "best")
    assert not any("lora" in name for name, _ in adapted.named_parameters())
    pairs = load_split(shared_data).val
    scores = evaluate(Segmenter(adapted), validation_loader(pairs, 64, 2))
    assert scores == (summary["val_dice"], summary["val_iou"])
    before = build_base(settings)
    encoder = adapted.image_encoder.state_dict()
    assert all(torch.equal(v, encoder[k]) for k, v in before.image_encoder.state_dict().items())


@pytest.mark.parametrize("method", ["decoder", "lora", "conv-lora"])
def test_trained_decoder_is_all_that_a_single_mask_uses(method):
    settings = settings_for(Path("x"), Path("y"), method=method)
    sam = attach_method(build_base(settings), settings)
    unused = set(samfast.models.unused_by_segment(sam))
    decoder = {n for n, _ in sam.named_parameters() if n.startswith("mask_decoder.")}
    trained = {n for n, _ in samfast.trainable_parameters(sam)}
    assert {n for n in trained if n.startswith("mask_decoder.")} == decoder - unused
    assert samfast.models.head_of(sam) == ("binary" if method == "conv-lora" else "sam")


@pytest.mark.slow_on_cpu
def test_options_reach_the_model(shared_data, tmp_path, capsys):
    arguments = ["finetune", "--data", str(shared_data), "--model", "vit_tiny", "--epochs", "1"]
    arguments += ["--image-size", "64", "--rank", "2", "--slices", "q", "v", "--no-flips"]
    arguments += ["--accumulate", "2", "--repeats", "2", "--precision", "bf16", "--json"]
    arguments += ["--output", str(tmp_path / "out"), "--overlays", "0", "--foreground", "255"]
    arguments += ["--backend", "torch", "--lr", "5e-4", "--schedule", "constant", "--clip", "0"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert "all foreground" in err
    assert summary["precision"] == "bfloat16"
    assert summary["steps"] == 3  # ten images: five batches, the last step takes one
    assert float(rows_of(tmp_path / "out")[0]["lr"]) == 5e-4
    assert not (tmp_path / "out" / "overlays").exists()
    record = read_adapter_config(tmp_path / "out" / "adapter" / "best")
    assert record["method"]["rank"] == 2 and record["method"]["slices"] == ["q", "v"]
    assert record["extra"]["foreground"] == [255]


@pytest.mark.slow_on_cpu
def test_a_checkpoint_is_the_base_and_must_be_given_again(shared_data, tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    options = {"checkpoint": tiny_checkpoint, "epochs": 1}
    finetune(settings_for(shared_data, output, **options))
    with pytest.raises(ValueError, match=r"vit_tiny from tiny\.pth; say where .* --checkpoint"):
        load_adapted(output / "adapter" / "best")
    adapted = load_adapted(output / "adapter" / "best", tiny_checkpoint).state_dict()
    stored = torch.load(tiny_checkpoint, weights_only=True)
    name = "image_encoder.blocks.0.mlp.lin1.weight"
    assert torch.equal(adapted[name], stored[name])


@pytest.mark.slow_on_cpu
def test_output_is_protected_and_overwriting_keeps_foreign_files(run, shared_data, tmp_path):
    settings, _ = run
    with pytest.raises(ValueError, match=r"output folder .*out is not empty"):
        finetune(settings)
    output = tmp_path / "out"
    (output / "adapter" / "old").mkdir(parents=True)
    (output / "mine.txt").write_text("keep")
    finetune(settings_for(shared_data, output, epochs=1, overwrite=True))
    assert (output / "mine.txt").read_text() == "keep"
    assert sorted(p.name for p in (output / "adapter").iterdir()) == ["best", "last"]


def poisoned(monkeypatch, batch: int, effect):
    """Let ``effect`` change the loss of one training batch, counted from 1 over the whole run."""
    count = 0
    whole = LOSSES["bce-dice"]

    def loss(*args):
        nonlocal count
        count += torch.is_grad_enabled()
        hit = torch.is_grad_enabled() and count == batch
        return effect(whole(*args)) if hit else whole(*args)

    monkeypatch.setitem(LOSSES, "bce-dice", loss)


@pytest.mark.slow_on_cpu
def test_a_loss_that_is_not_finite_keeps_the_last_good_adapter(
    shared_data, tmp_path, monkeypatch, capfd
):
    poisoned(monkeypatch, 5, lambda loss: loss * float("nan"))
    output = tmp_path / "out"
    arguments = ["finetune", "--data", str(shared_data), "--model", "vit_tiny", "--image-size"]
    arguments += ["64", "--repeats", "1", "--epochs", "2", "--output", str(output)]
    assert cli.main(arguments) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "the loss is nan in step 5; the largest gradient of " in err
    assert "; the images were p" in err and "epoch-001 is kept" in err
    assert len(rows_of(output)) == 1
    assert read_adapter_config(output / "adapter" / "last")["extra"]["epoch"] == 1
    tensors = load_adapted(output / "adapter" / "last").state_dict().values()
    assert all(t.isfinite().all() for t in tensors)


def infinite_gradient(loss):
    return loss + _Blown.apply(loss)  # the value stays


def test_gradients_that_are_not_finite_are_noticed_before_saving(
    shared_data, tmp_path, monkeypatch
):
    poisoned(monkeypatch, 3, infinite_gradient)
    told = "is not finite after step 3; nothing was saved"
    with pytest.raises(FloatingPointError, match=told):
        finetune(settings_for(shared_data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow_on_cpu
def test_weights_that_are_not_finite_keep_the_last_good_adapter(
    shared_data, tmp_path, monkeypatch, capfd
):
    poisoned(monkeypatch, 6, infinite_gradient)  # the last batch of epoch 2: no loss shows it
    output = tmp_path / "out"
    arguments = ["finetune", "--data", str(shared_data), "--model", "vit_tiny", "--image-size"]
    arguments += ["64", "--repeats", "1", "--epochs", "2", "--output", str(output)]
    assert cli.main(arguments) == 2
    err = capfd.readouterr().err
    kept = f"is not finite after step 6; {output}/state/epoch-001 is kept; a smaller"
    assert err.count("\n") == 1 and kept in err
    assert len(rows_of(output)) == 1
    for name in ("last", "best"):
        assert read_adapter_config(output / "adapter" / name)["extra"]["epoch"] == 1
        load_adapted(output / "adapter" / name)


class _Blown(torch.autograd.Function):
    """Zero forward, NaN backward."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, dy):
        return dy * float("nan")


@pytest.mark.slow_on_cpu
def test_an_interrupt_keeps_what_was_saved(shared_data, tmp_path, monkeypatch, capfd):
    def interrupt(loss):
        raise KeyboardInterrupt

    poisoned(monkeypatch, 4, interrupt)
    output = tmp_path / "out"
    arguments = ["finetune", "--data", str(shared_data), "--model", "vit_tiny", "--image-size"]
    arguments += ["64", "--repeats", "1", "--epochs", "2", "--output", str(output)]
    assert cli.main(arguments) == 130
    assert capfd.readouterr().err == f"samfast: interrupted; {output} keeps epoch 1\n"
    load_adapted(output / "adapter" / "last")


def test_few_images_are_repeated_until_an_epoch_has_fifty_steps():
    def repeats(images, processes=1, **options):
        return _repeats(settings_for(Path("x"), Path("y"), **options), images, processes)

    assert repeats(20, repeats=None, batch_size=2) == 5
    assert repeats(30, repeats=None, batch_size=2) == 4
    assert repeats(20, repeats=None, batch_size=4, accumulate=2, processes=2) == 40
    assert repeats(100_000, repeats=None) == 1
    assert repeats(3, repeats=7) == 7


def test_the_learning_rate_warms_up_and_falls():
    factor = _factor("cosine", 200)
    values = [factor(step) for step in range(200)]
    assert values[:10] == [(i + 1) / 10 for i in range(10)] and values[10] == 1.0
    assert all(a > b for a, b in pairwise(values[10:]))
    assert 0 < values[-1] < 0.001
    assert _factor("constant", 200)(199) == 1.0
    polynomial = _factor("polynomial", 200)
    assert [polynomial(step) for step in (0, 50, 100, 150, 200, 201)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert _factor("cosine", 1)(0) == 1.0
