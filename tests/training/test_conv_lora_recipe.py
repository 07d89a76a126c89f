# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning with Conv-LoRA: its recipe, its head, its balancing loss, its files."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from budgets import within_budget
from PIL import Image

import samfast
from samfast import cli
from samfast.models import TRAINED_DECODER, binary_head, head_of
from samfast.models.architectures import ARCHITECTURES
from samfast.models.build import _construct
from samfast.modules.adapter_files import read_adapter_config
from samfast.training import loop
from samfast.training.build import attach_method, build_base
from samfast.training.evaluate import evaluate, validation_loader
from samfast.training.folders import load_split
from samfast.training.loop import finetune
from samfast.training.losses import LOSSES
from samfast.training.metrics import ForegroundScores
from samfast.training.predict import load_adapted
from samfast.training.recipe import with_recipe
from samfast.training.records import output_folder
from samfast.training.schedules import _factor
from samfast.training.segmenters import Segmenter
from samfast.training.settings import FinetuneSettings


def settings_for(data, output, **options):
    defaults = {"model": "vit_tiny", "image_size": 64, "epochs": 2, "repeats": 1, "lr": 3e-3}
    defaults |= {"method": "conv-lora", "val_fraction": 0.34, "experts": 4}
    return FinetuneSettings(data=data, output=output, **{**defaults, **options})


def rows_of(output):
    with (output / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(shared_data, tmp_path_factory):
    """One finished run: settings and summary."""
    output = tmp_path_factory.mktemp("conv-lora") / "out"
    settings = settings_for(shared_data, output, batch_size=1)
    return settings, finetune(settings)


def start_of(settings):
    """The model before the first step."""
    sam = build_base(settings)
    loop.seed_everything(settings.seed)
    return attach_method(sam, settings)


@pytest.mark.slow_on_cpu
def test_the_loss_falls_and_every_trained_tensor_moves(run):
    settings, _ = run
    rows = rows_of(settings.output)
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    before = start_of(settings)
    after = dict(load_adapted(settings.output / "adapter" / "last").named_parameters())
    moved = {n: not torch.equal(p, after[n]) for n, p in samfast.trainable_parameters(before)}
    assert all(moved.values()), [name for name, did in moved.items() if not did]
    assert {name.rpartition(".")[2] for name in moved if ".qkv." in name} == {
        *("lora_A", "lora_B", "expert_weight", "expert_bias", "w_gate", "w_noise")
    }
    frozen = [n for n, p in before.named_parameters() if not p.requires_grad]
    state = dict(before.named_parameters())
    assert frozen and all(torch.equal(state[n], after[n]) for n in frozen)


@pytest.mark.slow_on_cpu
def test_the_recipe_is_that_of_the_authors(run, tmp_path):
    settings, _ = run
    saved = json.loads((settings.output / "settings.json").read_text())
    assert (saved["rank"], saved["alpha"], saved["experts"]) == (3, 32.0, 4)
    assert (saved["loss"], saved["schedule"]) == ("structure", "polynomial")
    assert (saved["weight_decay"], saved["clip"]) == (1e-4, 1.0)
    method = read_adapter_config(settings.output / "adapter" / "best")["method"]
    assert method.items() >= {"name": "conv-lora", "rank": 3, "alpha": 32.0, "experts": 4}.items()
    rates = [float(row["lr"]) for row in rows_of(settings.output)]
    assert rates == [3e-3 * (1 - step / 8) for step in (3, 7)]  # of the last step of each epoch

    def rate(**options):
        options = {"data": tmp_path, "method": "conv-lora", **options}
        return with_recipe(FinetuneSettings(**options)).lr

    assert rate(checkpoint=tmp_path) == 1e-4 and rate(model="vit_tiny") == 1e-3
    assert rate(checkpoint=tmp_path, method="lora") == 2e-4


def test_a_schedule_resumes_where_it_was():
    def schedule():
        optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.3)
        factor = _factor("polynomial", 7)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def rates(optimizer, schedule, steps):
        for _ in range(steps):
            yield schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()

    whole = list(rates(*schedule(), 7))
    first, second = schedule(), schedule()
    part = list(rates(*first, 3))
    for new, old in zip(second, first, strict=True):
        new.load_state_dict(old.state_dict())
    assert part + list(rates(*second, 4)) == whole


@pytest.mark.slow_on_cpu
def test_the_balancing_loss_is_trained_with_weight_one(shared_data, tmp_path, monkeypatch):
    """Without the task's loss the gates move all the same, and the loss is the balance alone."""
    monkeypatch.setitem(LOSSES, "structure", lambda logits, *_: 0.0 * logits.sum())
    seen = []
    whole = samfast.aux_loss

    def watched(sam):
        seen.append(whole(sam))
        return seen[-1]

    monkeypatch.setattr(samfast, "aux_loss", watched)
    settings = settings_for(shared_data, tmp_path / "out", epochs=1, batch_size=1)
    finetune(settings)
    row = rows_of(settings.output)[0]
    losses = torch.stack(seen).detach()
    assert len(seen) == 4 and losses.min() > 0
    mean = torch.tensor(float(row["train_loss"]))
    within_budget(mean, losses.mean, losses.double().mean, torch.float32)
    before = start_of(settings)
    after = dict(load_adapted(settings.output / "adapter" / "last").named_parameters())
    for name, parameter in samfast.trainable_parameters(before):
        gate = name.endswith(("w_gate", "w_noise"))
        assert not gate or not torch.equal(parameter, after[name]), name


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_loaded_adapter_scores_exactly_what_was_written(run, which):
    settings, summary = run
    folder = settings.output / "adapter" / which
    sam = load_adapted(folder)
    assert head_of(sam) == read_adapter_config(folder)["head"] == "binary"
    pairs = load_split(settings.data, val_fraction=0.34).val
    scores = evaluate(Segmenter(sam), validation_loader(pairs, 64, settings.batch_size))
    epoch = summary["best_epoch"] if which == "best" else settings.epochs
    row = rows_of(settings.output)[epoch - 1]
    assert scores == (float(row["val_dice"]), float(row["val_iou"]))


def test_predict_writes_masks_that_score_the_same(run, tmp_path, capsys):
    settings, summary = run
    pairs = load_split(settings.data, val_fraction=0.34).val
    arguments = ["predict", *(str(p.image) for p in pairs), "--output", str(tmp_path / "out")]
    arguments += ["--adapter", str(settings.output / "adapter"), "--batch-size", "1", "--json"]
    arguments += ["--backend", "torch"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    scores = ForegroundScores()
    for pair, written in zip(pairs, result["images"], strict=True):
        truth = np.asarray(Image.open(pair.mask)) > 0
        mask = np.asarray(Image.open(written["mask"])) > 0
        scores.update(torch.from_numpy(mask), torch.from_numpy(truth))
    assert scores.compute() == (summary["val_dice"], summary["val_iou"])


@pytest.mark.slow_on_cpu
def test_two_runs_with_one_seed_are_equal(run, tmp_path):
    settings, _ = run
    again = replace(settings, output=tmp_path / "again")
    finetune(again)
    tensors = [
        load_adapted(output / "adapter" / "last").state_dict()
        for output in (settings.output, again.output)
    ]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.slow_on_cpu
def test_options_reach_the_model(shared_data, tmp_path):
    arguments = ["finetune", "--data", str(shared_data), "--model", "vit_tiny", "--epochs", "1"]
    arguments += ["--image-size", "64", "--method", "conv-lora", "--depthwise", "--rank", "4"]
    arguments += ["--alpha", "8", "--experts", "2", "--loss", "balanced-bce", "--repeats", "1"]
    arguments += ["--schedule", "constant", "--lr", "5e-4", "--precision", "bf16"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    adapted = load_adapted(tmp_path / "out" / "adapter" / "best")
    layer = adapted.image_encoder.blocks[0].attn.qkv
    assert layer.depthwise and (layer.rank, layer.alpha, layer.experts) == (4, 8.0, 2)
    assert layer.expert_weight.shape == (2, 4, 1, 3, 3)
    saved = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (saved["loss"], saved["schedule"]) == ("balanced-bce", "constant")
    assert float(rows_of(tmp_path / "out")[0]["lr"]) == 5e-4


def test_depthwise_runs_have_a_folder_of_their_own(tmp_path):
    settings = settings_for(tmp_path / "cells", None)
    names = [output_folder(s).name for s in (settings, replace(settings, depthwise=True))]
    assert names == ["cells-vit_tiny-conv-lora", "cells-vit_tiny-conv-lora-depthwise"]


@pytest.mark.parametrize(
    "name,count", [("vit_b", 3_624_768), ("vit_l", 3_817_728), ("vit_h", 4_020_096)]
)
def test_the_trained_parameters_are_as_many_as_published(name, count):
    with torch.device("meta"):
        sam = binary_head(_construct(ARCHITECTURES[name], 1024))
        samfast.attach(sam, samfast.ConvLora(), train=TRAINED_DECODER)
    assert samfast.report(sam).trained_parameters == count
