# SPDX-License-Identifier: Apache-2.0
"""Each kind of bad input through the command line: one sentence, exit code 2, nothing written."""

import shutil
import subprocess
import sys
from email.message import Message

import numpy as np
import pytest
import torch
from PIL import Image

import samfast
from samfast import cli
from samfast.models import build_sam
from samfast.training.losses import LOSSES


def tiny(data, *more):
    return ("finetune", "--data", data, "--model", "vit_tiny", "--image-size", 64, *more)


def test_missing_folder(refused, tmp_path):
    refused(*tiny(tmp_path / "nowhere"), pattern="data folder .*nowhere does not exist")


def test_image_without_mask(refused, data):
    (data / "masks" / "p3.png").unlink()
    refused(*tiny(data), pattern=r"image .*p3\.png has no mask")


def test_truncated_image(refused, data):
    path = data / "images" / "p3.png"
    path.write_bytes(path.read_bytes()[:700])
    refused(*tiny(data), pattern=r"images/p3\.png cannot be decoded")


def test_mask_of_another_size(refused, data):
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(data / "masks" / "p3.png")
    refused(*tiny(data), pattern=r"p3\.png is 7x5 .*is 64x60")


def test_mask_with_three_values(refused, data):
    Image.fromarray(np.arange(64 * 60, dtype=np.uint8).reshape(60, 64) % 3).save(
        data / "masks" / "p3.png"
    )
    refused(*tiny(data), pattern=r"p3\.png holds 3 values \(0, 1, 2\)")


def test_unknown_model(refused, shared_data):
    refused(
        "finetune",
        *("--data", shared_data, "--model", "vit_bb"),
        pattern="unknown model 'vit_bb'.*vit_b, ",
    )


def test_unknown_method(refused, shared_data):
    refused(
        *tiny(shared_data, "--method", "lroa"),
        pattern="unknown method 'lroa'.*lora, conv-lora, cobot-lora, .*, decoder",
    )


def test_large_model_needs_weights(refused, shared_data):
    refused(
        *("finetune", "--data", shared_data, "--model", "vit_b"),
        pattern="vit_b needs a checkpoint .*--random-init",
    )


def test_checkpoint_of_another_model(refused, shared_data, tiny_checkpoint):
    refused(
        *("finetune", "--data", shared_data, "--model", "vit_b", "--checkpoint", tiny_checkpoint),
        pattern=r"tiny\.pth",
    )


def test_missing_checkpoint(refused, shared_data, tmp_path):
    refused(
        *tiny(shared_data, "--checkpoint", tmp_path / "none.pth"), pattern=r"none\.pth does not"
    )


def test_corrupt_safetensors(refused, shared_data, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    refused(*tiny(shared_data, "--checkpoint", path), pattern=r"broken\.safetensors")


def test_rank_zero(refused, shared_data):
    refused(*tiny(shared_data, "--rank", 0), pattern="rank is 0")


def test_rank_larger_than_the_layer(refused, shared_data):
    refused(*tiny(shared_data, "--rank", 193), pattern="rank 193 is above 192")


def test_target_that_matches_no_layer(refused, shared_data):
    refused(*tiny(shared_data, "--target", "qvk"), pattern="target 'qvk' matches no layer")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "option,value,pattern",
    [
        ("--lr", "0", r"lr is 0\.0"),
        ("--lr", "nan", "lr is nan"),
        ("--epochs", "0", "epochs is 0"),
        ("--batch-size", "-1", "batch_size is -1"),
        ("--accumulate", "0", "accumulate is 0"),
        ("--seed", "-1", "seed is -1"),
        ("--val-fraction", "1.5", r"val_fraction is 1\.5"),
        ("--image-size", "100", "image size 100 is not a positive multiple of 16"),
        ("--schedule", "linear", "unknown schedule 'linear'; known are cosine, polynomial"),
        ("--precision", "fp8", "unknown precision 'fp8'; known are auto, bf16, fp16, fp32"),
        ("--backend", "cudnn", "unknown backend 'cudnn'; known are auto"),
        ("--backend", "cuda", "backend 'cuda' cannot run lora_linear"),
        ("--foreground", "9", "foreground 9 occurs in no mask"),
        (
            "--threshold",
            "255",
            r"no mask .* has a foreground pixel \(value > 255\); they hold 0, 255",
        ),
        ("--threshold", "nan", "threshold is nan; expected a finite number"),
        ("--bands", "0", "bands is '0'; expected one or three numbers from 1"),
        ("--bands", "1,2,4", r"p\d\.png holds 3 bands, but --bands names band 4"),
        ("--range", "5", "range is '5'; expected auto, full or LOW,HIGH"),
        ("--slices", "x", "'x'"),
        ("--dropout", "1.5", r"dropout is 1\.5"),
        ("--loss", "dice", "unknown loss 'dice'; known are bce-dice, structure, "),
        ("--experts", "4", "experts is 4, but method lora has none"),
    ],
)
def test_option_out_of_range(refused, shared_data, option, value, pattern):
    refused(*tiny(shared_data), option, value, pattern=pattern)


@pytest.mark.slow_on_cpu("arguments2", "arguments3")
@pytest.mark.parametrize(
    "arguments,pattern",
    [
        (("--rank", 0), "rank is 0"),
        (("--rank", 193), "rank 193 is above 192"),
        (("--experts", 0), "experts is 0"),
        (("--alpha", "nan"), "alpha is nan"),
        (("--slices", "q"), "slices are q, but method conv-lora adapts whole layers"),
        (("--backend", "cuda"), "backend 'cuda' cannot run "),
    ],
)
def test_options_of_conv_lora(refused, shared_data, arguments, pattern):
    refused(*tiny(shared_data, "--method", "conv-lora"), *arguments, pattern=pattern)


def test_depthwise_belongs_to_conv_lora(refused, shared_data):
    for method, lacks in (("lora", "none"), ("decoder", "no adapters")):
        arguments = tiny(shared_data, "--method", method, "--depthwise")
        refused(*arguments, pattern=f"depthwise is True, but method {method} has {lacks}")


def test_the_decoder_alone_has_no_rank(refused, shared_data):
    arguments = tiny(shared_data, "--method", "decoder", "--rank", 8)
    refused(*arguments, pattern="rank is 8, but method decoder has no adapters")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is right on a GPU")
def test_fp16_needs_a_gpu(refused, shared_data):
    refused(*tiny(shared_data, "--precision", "fp16"), pattern="fp16 needs a CUDA device")


@pytest.mark.slow_on_cpu
def test_out_of_memory_comes_with_advice(refused, shared_data, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setitem(LOSSES, "bce-dice", full)
    refused(*tiny(shared_data), pattern=r"out of memory \(CUDA out of memory\).*--batch-size")


@pytest.mark.parametrize("kind", [RuntimeError, TypeError])
def test_our_own_mistakes_keep_their_traceback(monkeypatch, capsys, kind):
    def wrong(*_):
        raise kind("a mistake")

    monkeypatch.setattr(cli, "_run", wrong)
    monkeypatch.delenv("SAMFAST_TRACEBACK", raising=False)
    assert cli.main(["info"]) == 1
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == f"{kind.__name__}: a mistake"
    said = "samfast: this is a bug in samfast; please report it with the lines above at "
    assert last == said + cli._tracker()
    monkeypatch.setenv("SAMFAST_TRACEBACK", "1")
    with pytest.raises(kind, match="a mistake"):
        cli.main(["info"])


def test_bugs_are_reported_where_the_package_says(monkeypatch):
    told = Message()
    monkeypatch.setattr(cli.metadata, "metadata", lambda _: told)
    assert cli._tracker() == "the project's issue tracker"
    told["Project-URL"] = "Homepage, https://samfast.example"
    assert cli._tracker() == "https://samfast.example"
    told["Project-URL"] = "Issues, https://samfast.example/issues, old"
    assert cli._tracker() == "https://samfast.example/issues, old"


@pytest.mark.parametrize(
    "line,advice",
    [
        (
            "finetune",
            "try --memory minimal, --decoder-chunk 1, a smaller --batch-size (with a larger "
            "--accumulate) or a smaller --image-size",
        ),
        ("finetune --batch-size 1 --memory minimal", "try a smaller --image-size"),
        (
            "finetune --batch-size 1 --no-fuse --tasks t.yaml",
            "try --fuse, --decoder-chunk 1 or a smaller --image-size",
        ),
        ("finetune --batch-size 1 --method decoder", "try --no-cache or a smaller --image-size"),
        ("evaluate --data d --adapter a", "try --decoder-chunk 1 or a smaller --batch-size"),
        ("predict p --adapter a --batch-size 1", "try --decoder-chunk 1"),
        (
            "predict p --adapter a --batch-size 1 --decoder-chunk 1",
            "no option needs less; use a device with more memory",
        ),
        ("info", "no option needs less; use a device with more memory"),
    ],
)
def test_advice_is_what_is_not_so_already(monkeypatch, capsys, line, advice):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(cli, "_run", full)
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err == f"samfast: out of memory; {advice}\n"


def test_predict_refuses_before_writing(refused, shared_data, tmp_path):
    image = shared_data / "images" / "p0.png"
    predict = ("predict", image, "--adapter")
    refused(*predict, tmp_path / "none", pattern="adapter folder .*none does not exist")
    (tmp_path / "empty").mkdir()
    refused(*predict, tmp_path / "empty", pattern="has no adapter_config")
    refused("predict", "--adapter", tmp_path, pattern="expected images; give files or folders")
    missing = ("predict", tmp_path / "a.png", "--adapter", tmp_path)
    refused(*missing, pattern=r"a\.png does not exist")
    refused("predict", tmp_path / "empty", "--adapter", tmp_path, pattern="has no images")
    broken = tmp_path / "b.png"
    broken.write_bytes(image.read_bytes()[:300])
    sam = samfast.attach(build_sam("vit_tiny", image_size=64), samfast.DecoderOnly())
    samfast.save_adapter(sam, tmp_path / "adapter")
    adapter = ("--adapter", tmp_path / "adapter")
    refused("predict", broken, *adapter, pattern=r"b\.png cannot be decoded")
    refused("predict", image, *adapter, "--bands", "1,2", pattern="bands is '1,2'; expected one or")
    refused("predict", image, *adapter, "--bands", "4", pattern="holds 3 bands, but --bands names")
    refused("predict", image, *adapter, "--range", "9,1", pattern="range is '9,1'; expected auto")
    shutil.copytree(shared_data / "images", tmp_path / "again")
    twice = ("predict", image, tmp_path / "again" / "p0.png", "--adapter", tmp_path)
    refused(*twice, pattern="two images are called p0")


def test_wrong_options_end_with_two_and_help_with_zero(capsys):
    for argv in ([], ["finetune"], ["finetune", "--data"], ["fly"], ["predict", "--nope"]):
        assert cli.main(argv) == 2
    assert capsys.readouterr().err
    for command in ([], ["finetune"], ["predict"], ["info"]):
        assert cli.main([*command, "--help"]) == 0
    assert "--val-fraction" in capsys.readouterr().out


def test_help_needs_no_torch():
    code = "import sys; from samfast.cli import main; main(['finetune', '--help'])"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
