# SPDX-License-Identifier: Apache-2.0
"""--memory, --base-dtype and --decoder-chunk: what they reach, and what they refuse."""

import json
from dataclasses import replace

import pytest
import torch

import samfast
from samfast import cli
from samfast.kernels.sam_block import plan
from samfast.modules import attach
from samfast.training import loop, segmenters
from samfast.training import settings as options
from samfast.training.build import attach_method, build_base
from samfast.training.callbacks import Callback
from samfast.training.loop import finetune
from samfast.training.precision import base_dtype
from samfast.training.segmenters import Segmenter
from samfast.training.settings import FinetuneSettings

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_names_are_those_of_the_library():
    assert options.MEMORY == plan.MEMORY
    names = ("auto", *(str(dtype).removeprefix("torch.") for dtype in attach.BASE_DTYPES))
    assert names == options.BASE_DTYPES


@pytest.mark.parametrize(
    ("name", "dtype", "device", "expected"),
    [
        ("auto", BF16, CUDA, BF16),
        ("auto", FP16, CUDA, None),
        ("auto", FP32, CUDA, None),
        ("auto", BF16, CPU, None),
        ("float32", BF16, CUDA, None),
        ("bfloat16", BF16, CPU, BF16),
        ("bfloat16", FP32, CPU, BF16),
        ("float16", FP16, CUDA, FP16),
    ],
)
def test_base_dtype(name, dtype, device, expected):
    assert base_dtype(name, dtype, device) == expected


@pytest.mark.parametrize(
    ("name", "dtype", "sentence"),
    [
        ("bfloat16", FP16, "bfloat16 cannot be used with precision fp16"),
        ("float16", BF16, "float16 needs precision fp16, which scales the loss, got bf16"),
        ("float16", FP32, "float16 needs precision fp16, which scales the loss, got fp32"),
    ],
)
def test_dtypes_that_do_not_go_together(name, dtype, sentence):
    with pytest.raises(ValueError, match=sentence):
        base_dtype(name, dtype, CUDA)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--memory", "little"), "unknown memory 'little'; known are fast, balanced, minimal"),
        (("--memory", "fast", "--no-fuse"), "memory is fast, which only the fused encoder has"),
        (("--base-dtype", "fp8"), "unknown base_dtype 'fp8'; known are auto, float32, bfloat16, "),
        (("--base-dtype", "float16"), "base dtype float16 needs precision fp16"),
        (("--decoder-chunk", "0"), "decoder_chunk is 0; it must be at least 1"),
    ],
)
def test_refused(refused, shared_data, arguments, pattern):
    if torch.cuda.is_available():
        arguments += ("--precision", "fp32")
    common = ("finetune", "--data", shared_data, "--model", "vit_tiny", "--image-size", 64)
    refused(*common, *arguments, pattern=pattern)


def test_no_data_is_refused(refused):
    refused(
        "finetune", "--model", "vit_tiny", pattern="no data folder is named; give it with --data"
    )


def test_predict_refuses_no_objects(refused, shared_data, tmp_path):
    image = shared_data / "images" / "p0.png"
    predict = ("predict", image, "--adapter", tmp_path, "--decoder-chunk", 0)
    refused(*predict, pattern="decoder_chunk is 0; it must be at least 1")


@pytest.mark.parametrize("memory", [None, "balanced"])
def test_they_reach_the_model(memory, monkeypatch):
    given = FinetuneSettings(model="vit_tiny", image_size=64, memory=memory, decoder_chunk=3)
    sam = attach_method(build_base(given), given, BF16)
    assert {block.memory for block in sam.image_encoder.blocks} == {memory or "fast"}
    assert sam.image_encoder.patch_embed.proj.weight.dtype == BF16
    assert {p.dtype for _, p in samfast.trainable_parameters(sam)} == {FP32}

    def segment(model, images, boxes, *, decoder_chunk):
        assert model is sam and boxes is None and decoder_chunk == 3
        return images.new_zeros(len(images), 1, 64, 64)

    monkeypatch.setattr(segmenters, "segment", segment)
    model = Segmenter(sam, FP32, given.decoder_chunk)
    model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.full((2, 2), 64))


def run(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.mark.slow_on_cpu
def test_the_same_training_whatever_is_kept(shared_data, tmp_path):
    """To the bit on a CPU; and in bfloat16, with chunks, to an adapter that predicts."""
    common = ["finetune", "--data", shared_data, "--model", "vit_tiny", "--image-size", 64]
    common += ["--epochs", 1, "--repeats", 1, "--overlays", 0, "--threads", 1]
    for memory in ("fast", "minimal"):
        run(*common, "--output", tmp_path / memory, "--memory", memory)
    files = [
        tmp_path / m / "adapter/last" / "adapter_model.safetensors" for m in ("fast", "minimal")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()

    output = tmp_path / "chunks"
    run(*common, "--output", output, "--base-dtype", "bfloat16", "--decoder-chunk", 1)
    record = samfast.read_adapter_config(output / "adapter/last")
    assert record["base_dtype"] == "bfloat16"
    saved = json.loads((output / "settings.json").read_text())
    assert saved["decoder_chunk"] == 1 and saved["base_dtype"] == "bfloat16"
    image = shared_data / "images" / "p0.png"
    masks = []
    for chunk in ((), ("--decoder-chunk", 1)):
        folder = tmp_path / f"masks{len(chunk)}"
        run("predict", image, image.with_name("p1.png"), "--adapter", output / "adapter/last",
            "--output", folder, *chunk)  # fmt: skip
        masks.append(sorted(path.name for path in folder.iterdir()))
    assert masks[0] == masks[1] != []


@pytest.mark.slow_on_cpu
def test_a_plan_s_accumulation_is_trained_with(shared_data, tmp_path, monkeypatch):
    """accelerate was told another number before the plan was made."""
    plan = {"batch_size": 1, "accumulate": 4, "memory": "minimal", "fit": None}
    monkeypatch.setattr(loop, "planned", lambda settings, *_: (replace(settings, **plan), None))
    steps = []

    class Counts(Callback):
        def on_step(self, run, loss):
            steps.append(run.batch)

    settings = FinetuneSettings(
        data=shared_data,
        output=tmp_path / "out",
        model="vit_tiny",
        image_size=64,
        epochs=1,
        repeats=1,
        batch_size=4,
        fit="12GB",
    )
    finetune(settings, callbacks=[Counts()])
    assert steps == [4, 5]  # batches of five images, in steps of four
