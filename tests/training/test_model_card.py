# SPDX-License-Identifier: Apache-2.0
"""README.md of adapters and merged models: what the Hub reads, and that only facts are in it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

import samfast
from samfast import cli
from samfast.files.model_card import base_model, card, check_license, table, text_of
from samfast.models import build_sam
from samfast.modules.adapter_files import read_adapter_config
from samfast.training.loop import finetune
from samfast.training.settings import FinetuneSettings


def parts(text: str) -> tuple[dict, str]:
    """Front matter and the rest, as the Hub cuts them apart."""
    begin, front, rest = text.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(front), rest


def cells(text: str, first: str) -> list[str]:
    """The cells of a table's line."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.fixture(scope="module")
def run(shared_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    settings = FinetuneSettings(
        data=shared_data,
        output=output,
        model="vit_tiny",
        image_size=64,
        epochs=2,
        repeats=1,
        val_fraction=0.34,
        prompt="box",
        license="cc-by-4.0",
        overlays=0,
    )
    return settings, finetune(settings)


def test_an_adapter_folder_is_a_hub_folder(run):
    folder = run[0].output / "adapter" / "best"
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names
    front, text = parts((folder / "README.md").read_text())
    assert front == {
        "library_name": "peft",  # plain LoRA is in PEFT's format
        "license": "cc-by-4.0",
        "pipeline_tag": "mask-generation",
        "tags": ["samfast", "segment-anything", "lora"],
    }
    assert "terms are unknown" not in text and "random weights (seed 0)" in text


def test_huggingface_hub_reads_the_card(run):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    read = hub.ModelCard.load(run[0].output / "adapter" / "best" / "README.md")
    assert read.data.library_name == "peft" and read.data.license == "cc-by-4.0"
    assert read.data.pipeline_tag == "mask-generation" and "## Data" in read.text


def test_the_card_has_the_runs_numbers(run):
    settings, summary = run
    text = (settings.output / "adapter" / "best" / "README.md").read_text()
    assert cells(text, "images") == ["4", "2"]
    ours, baseline = cells(text, "val_dice")
    assert ours == f"{summary['val_dice']:.4f}"
    assert baseline == f"{summary['all_foreground_dice']:.4f}"
    assert f"Epoch {summary['best_epoch']}." in text
    assert f"{summary['trained_parameters']:,} trained parameters" in text
    assert cells(text, "epochs") == ["2"] and cells(text, "box_jitter") == ["1.0"]
    assert "weight_decay" not in text  # is the default
    assert f"samfast {samfast.__version__}" in text and "--box 40,25,310,200" in text
    for private in (str(settings.output), str(settings.data)):
        assert private not in text


def test_last_is_of_the_last_epoch(run):
    folder = run[0].output / "adapter" / "last"
    assert "Epoch 2." in (folder / "README.md").read_text()


def test_classes_and_their_pixels(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    pixels = np.zeros(3, int)
    for i in range(4):
        mask = np.random.default_rng(i).integers(0, 3, (32, 32)).astype(np.uint8)
        Image.fromarray(mask * 80).convert("RGB").save(tmp_path / "data" / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{i}.png")
    settings = FinetuneSettings(
        data=tmp_path / "data",
        output=tmp_path / "out",
        model="vit_tiny",
        image_size=64,
        epochs=1,
        repeats=1,
        overlays=0,
        masks="classes",
        classes=3,
        method="decoder",
    )
    finetune(settings)
    for stem in json.loads((settings.output / "settings.json").read_text())["val"]:
        mask = np.asarray(Image.open(settings.data / "masks" / f"{stem}.png"))
        pixels += np.bincount(mask.ravel(), minlength=3)
    front, text = parts((settings.output / "adapter" / "best" / "README.md").read_text())
    assert front["library_name"] == "samfast" and front["license"] == "unknown"
    assert front["pipeline_tag"] == "image-segmentation" and "terms are unknown" in text
    table = text.partition("pixels in the masks")[2]
    rows = re.findall(r"^\| \w+ \| (\d) \|[^|]*\| (\d+) \|", table, re.MULTILINE)
    assert rows == [(str(i), str(count)) for i, count in enumerate(pixels)]


def test_a_merged_folder_has_the_training_and_the_license(run, tmp_path):
    adapter = run[0].output / "adapter" / "best"
    own = (adapter / "README.md").read_text()
    assert cli.main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "hf")]) == 0
    front, text = parts((tmp_path / "hf" / "README.md").read_text())
    assert front["library_name"] == "transformers" and front["license"] == "cc-by-4.0"
    assert "transformers.SamModel" in text and "\n\n\n" not in text
    assert text[text.index("## Data") :] == own[own.index("## Data") :]


def test_a_merged_folder_of_an_adapter_without_a_card(run, tmp_path):
    best = run[0].output / "adapter" / "best"
    record = read_adapter_config(best)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((best / name).read_bytes())
    words = ["merge", "--adapter", str(bare), "--output", str(tmp_path / "hf"), "--license", "mit"]
    assert cli.main(words) == 0
    front, text = parts((tmp_path / "hf" / "README.md").read_text())
    assert front["license"] == "mit"
    assert cells(text, "val_dice") == [f"{record['extra']['val_dice']:.4f}"]


@pytest.mark.parametrize("name", ["Apache 2.0", "MIT", "", "apache-2.0\nlicense: mit"])
def test_what_is_no_license_is_refused(run, name, tmp_path):
    settings = replace(run[0], license=name, output=tmp_path / "new")
    with pytest.raises(ValueError, match="expected license to be an identifier"):
        finetune(settings)
    assert not (tmp_path / "new").exists()


def test_a_file_has_no_license(run, tmp_path, capsys):
    out = tmp_path / "sam.pth"
    words = ["merge", "--adapter", str(run[0].output), "--output", str(out), "--license", "mit"]
    assert cli.main(words) == 2
    assert "is a file without a model card" in capsys.readouterr().err and not out.exists()


def test_known_weights():
    check_license("apache-2.0")
    assert base_model("weights/sam_vit_l_0b3195.pth") == "facebook/sam-vit-large"
    cached = "hub/models--me--my-sam/snapshots/0123abc"
    assert base_model(cached) == "me/my-sam"
    assert base_model("models/facebook/sam-vit-base") == "facebook/sam-vit-base"
    for unknown in (None, "vit_b.pth", "me/sam-vit-base", "facebook/other"):
        assert base_model(unknown) is None


def test_text_that_means_something_to_markdown_or_yaml():
    written = card({"license": "no", "base_model": "a/b: c", "tags": ["x", "true"]}, "a", [])
    assert parts(written.decode())[0] == {
        "license": "no",
        "base_model": "a/b: c",
        "tags": ["x", "true"],
    }
    assert table(("a",), [("x|y\nz",)]).splitlines()[-1] == r"| x\|y z |"
    assert text_of("batch_size") == "batch_size" and text_of("_a_") == r"\_a\_"
    card({}, "of \udcff.pth", [])  # a file name that is not UTF-8


def test_save_adapter_alone_writes_no_card(tmp_path):
    sam = samfast.attach(build_sam("vit_tiny", image_size=64), samfast.Lora())
    assert not (samfast.save_adapter(sam, tmp_path / "a") / "README.md").exists()
