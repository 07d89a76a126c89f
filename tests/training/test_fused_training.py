# SPDX-License-Identifier: Apache-2.0
"""finetune and predict with fused attention, the default, and without."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.modeling.image_encoder import Block

from samfast import cli
from samfast.modules import SamBlock
from samfast.training.build import attach_method, build_base
from samfast.training.predict import load_adapted
from samfast.training.settings import FinetuneSettings


def run(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


def rows_of(output):
    with (output / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow_on_cpu("lora")
@pytest.mark.slow_on_cpu("conv-lora")
@pytest.mark.parametrize("method", ["lora", "conv-lora"])
def test_the_same_training_with_and_without(shared_data, tmp_path, method, monkeypatch):
    """The loss of every epoch, the adapter's names and shapes, and masks of either prediction."""
    common = ["--data", shared_data, "--model", "vit_tiny", "--image-size", 64, "--method", method]
    common += ["--epochs", 2, "--repeats", 1, "--lr", 1e-3, "--overlays", 0]
    fused, stock = tmp_path / "fused", tmp_path / "stock"
    run("finetune", *common, "--output", fused)
    run("finetune", *common, "--output", stock, "--no-fuse")
    for output, expected in ((fused, True), (stock, False)):
        assert json.loads((output / "settings.json").read_text())["fuse"] is expected
    losses = [[float(row["train_loss"]) for row in rows_of(folder)] for folder in (fused, stock)]
    assert np.abs(np.subtract(*losses)).max() <= 2e-6
    assert losses[0][-1] < losses[0][0]
    configs = [(f / "adapter/last/adapter_config.json").read_text() for f in (fused, stock)]
    records = [json.loads(text) for text in configs]
    for record in records:
        record.get("auto_mapping", {}).get("samfast", record).pop("extra")
    assert records[0] == records[1]

    forward, ran = SamBlock.forward, []
    monkeypatch.setattr(SamBlock, "forward", lambda self, x: ran.append(1) or forward(self, x))
    images = [shared_data / "images" / f"p{i}.png" for i in range(3)]
    for flag in ("--fuse", "--no-fuse"):
        arguments = ["--adapter", fused / "adapter/last", "--output", tmp_path / flag, flag]
        run("predict", *images, *arguments)
        assert bool(ran) is (flag == "--fuse")
        ran.clear()
    for image in images:
        name = f"{image.stem}_mask.png"
        masks = [np.asarray(Image.open(tmp_path / f / name)) for f in ("--fuse", "--no-fuse")]
        assert (masks[0] != masks[1]).mean() < 0.001


@pytest.mark.parametrize(("fuse", "kind"), [(True, SamBlock), (False, Block)])
def test_what_runs(shared_data, tmp_path, fuse, kind):
    settings = FinetuneSettings(
        data=shared_data, model="vit_tiny", image_size=64, method="decoder", fuse=fuse
    )
    sam = attach_method(build_base(settings), settings)
    assert {type(block) for block in sam.image_encoder.blocks} == {kind}


def test_a_backend_that_a_block_lacks_is_refused_at_once(refused, shared_data, monkeypatch):
    """The decoder alone has no adapter to try the backend on; a fused block is one more."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    arguments = ["--data", shared_data, "--model", "vit_tiny", "--method", "decoder"]
    if torch.cuda.is_available():
        pytest.skip("triton runs on a GPU")
    pattern = "backend 'triton' cannot run sam_block"
    refused("finetune", *arguments, "--backend", "triton", pattern=pattern)


@pytest.mark.slow_on_cpu
def test_loading_is_fused_unless_told_otherwise(shared_data, tmp_path):
    output = tmp_path / "out"
    arguments = ["--data", shared_data, "--model", "vit_tiny", "--image-size", 64, "--epochs", 1]
    run("finetune", *arguments, "--repeats", 1, "--overlays", 0, "--output", output)
    loaded = load_adapted(output / "adapter" / "best")
    plain = load_adapted(output / "adapter" / "best", fuse=False)
    assert type(loaded.image_encoder.blocks[0]) is SamBlock
    assert type(plain.image_encoder.blocks[0]) is Block
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
