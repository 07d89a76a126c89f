# SPDX-License-Identifier: Apache-2.0
"""``samfast warmup``: what it refuses, its options, and that a run then compiles nothing.

Tests import kernels for the interpreter, so what launches runs in processes of its own.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_folder, rectangle
from PIL import Image

from samfast import cli
from samfast.training.advice import memory_advice
from samfast.training.settings import FinetuneSettings, WarmupSettings

pytest.importorskip("triton", reason="triton is not installed")
from samfast.training import kernel_cache, warmup

ROOT = Path(__file__).parents[2]
SMALL = ["--model", "vit_tiny", "--image-size", "64", "--precision", "bf16"]
SMALL += ["--base-dtype", "bfloat16"]  # where a CPU stands for a GPU
METHODS = ("lora", "conv-lora", "cobot-lora", "adaptformer", "cobot-adaptformer", "kronecker")
TASKS = """
tasks:
  - {name: box, kind: semantic, channels: 2, folder: classes}
  - {name: depth, kind: regression, folder: depth}
"""


def run(*command, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(capfd, *words):
    assert cli.main(["warmup", *words]) == 2
    return capfd.readouterr().err


@pytest.mark.parametrize(
    ("interpreted", "sentence"),
    [
        ("0", "expected a GPU to compile kernels for, found none; run samfast warmup"),
        ("1", "TRITON_INTERPRET is 1, but interpreted kernels are not compiled; unset it"),
    ],
)
def test_without_a_gpu_it_says_so(capfd, monkeypatch, interpreted, sentence):
    assert warmup  # imported before, since importing kernels reads the variable
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    error = refused(capfd, "--model", "vit_h")
    assert error.startswith(f"samfast: {sentence}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "vit_x"], "unknown model 'vit_x'"),
        (["--experts", "3"], "experts is 3, but method lora"),
        (["--method", "ta-lora"], "method ta-lora is for several tasks; name their file"),
        (["--memory", "minimal", "--no-fuse"], "memory is minimal, which only the fused encoder"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
    ],
)
def test_options_are_checked_as_those_of_finetune(capfd, words, sentence):
    assert sentence in refused(capfd, *words)


def test_options_are_those_of_finetune():
    own = {field.name: field for field in dataclasses.fields(WarmupSettings)}
    others = {field.name: field for field in dataclasses.fields(FinetuneSettings)}
    assert own.keys() < others.keys()
    for name, field in own.items():
        assert (field.type, field.default) == (others[name].type, others[name].default), name
        assert name in ("model", "json") or field.metadata == others[name].metadata


def test_advice_where_memory_runs_out():
    advice = memory_advice(WarmupSettings(batch_size=4, memory="minimal"), main_memory=False)
    assert advice.startswith("try --decoder-chunk 1, a smaller --batch-size")


def test_memory_is_zero_where_launches_are_left_out():
    allocate = torch.empty, torch.empty_like, torch.Tensor.new_empty
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        with kernel_cache.recording() as forms:
            x = torch.empty(3)
            assert not (x.any() or torch.empty_like(x).any() or x.new_empty(3).any())
        assert torch.empty(3).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not forms
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == allocate


@pytest.mark.slow
def test_forms_are_those_that_finetune_launches(tmp_path):
    """Of every method; the last batches of training and validation are smaller."""
    folder = fill_folder(tmp_path / "data", 5)
    for kind in ("classes", "depth"):
        (folder / kind).mkdir()
    for i in range(5):
        mask = rectangle(i, 48 + 4 * i, 64)[1]
        Image.fromarray(mask.astype(np.uint8)).save(folder / "classes" / f"p{i}.png")
        Image.fromarray(mask.astype(np.float32)).save(folder / "depth" / f"p{i}.tif")
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(TASKS)
    methods = [*METHODS, "decoder", f"ta-lora:{tasks}"]
    text = run("tests.instruments.warmup_launches", tmp_path, *methods, cache=tmp_path / "cache")
    told = json.loads(text.splitlines()[-1])
    assert list(told) == methods
    for method, found in told.items():
        assert found["lacks"] == [] and found["launched"] >= 5, (method, found)
        assert found["launches"] == 0 and found["same"], (method, found)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "cobot-lora"])
def test_a_run_in_another_process_compiles_nothing(data, tmp_path, method):
    cache, words = tmp_path / "cache", [*SMALL, "--method", method]
    options = ("benchmarks.stand_in", "--compile", "--", "-m", "samfast")
    text = run(*options, "warmup", *words, cache=cache)
    kernels, compiled, found = map(int, re.search(_COUNTS, text).groups())
    assert kernels == compiled >= 20 and found == 0, text
    assert f"they are in {cache}" in text
    trained = ("finetune", *words, "--data", data, "--output", tmp_path / "run", "--epochs", 1)
    text = run(*options, *trained, "--repeats", 1, cache=cache)
    assert f"{kernels} hits, 0 compiles, 0 C compiles" in text
    text = run(*options, "warmup", *words, cache=cache)
    assert re.search(_COUNTS, text).groups() == (str(kernels), "0", str(kernels)), text


_COUNTS = r"(\d+) kernels: (\d+) compiled, (\d+) found in the cache"
