# SPDX-License-Identifier: Apache-2.0
"""--config: options from a file mean what they mean on the command line, or one sentence."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from samfast import cli
from samfast.training.checks import check_settings
from samfast.training.config_file import RECORDED, settings_from_file
from samfast.training.recipe import with_recipe
from samfast.training.settings import FinetuneSettings

OLD = json.loads((Path(__file__).parents[1] / "golden" / "settings-0.1.0.json").read_text("utf-8"))
SMALL = "--model vit_tiny --image-size 64 --epochs 1 --repeats 1 --overlays 0".split()
WORDS = """
# what the command line spells --data photos …
data: photos
batch-size: 4
image_size: 0512
foreground: [1, any]
target: [qkv, proj]
lr: 1e-4
val-fraction: .3
range: auto
bands: 010   # octal in YAML, here what it looks like
flips: no
fuse: true
threads: null
"""
LINE = (
    "--data photos --batch-size 4 --image-size 0512 --foreground 1 any --target qkv proj --lr 1e-4 "
    "--val-fraction .3 --range auto --bands 010 --no-flips --fuse"
)


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parsed(*argv) -> FinetuneSettings:
    return cli._parsed(["finetune", *map(str, argv)])


def test_a_file_means_what_the_command_line_means(tmp_path):
    expected = parsed(*LINE.split())
    assert parsed("--config", written(tmp_path, WORDS)) == expected
    assert FinetuneSettings(**settings_from_file(tmp_path / "run.yaml")) == expected
    as_json = {"data": "photos", "batch-size": 4, "image_size": 512, "foreground": [1, "any"]}
    as_json |= {"target": ["qkv", "proj"], "lr": 1e-4, "val_fraction": 0.3, "bands": "010"}
    path = written(tmp_path, json.dumps({**as_json, "flips": False, "threads": None}, indent="\t"))
    assert parsed(f"--config={path}") == expected


def test_the_command_line_wins(tmp_path):
    path = written(tmp_path, WORDS + "json: true\n")
    line = "--batch-size 8 --flips --foreground 7 --target lin1 --no-json --no-fuse --lr 0.1"
    found = parsed("--config", path, *line.split())
    assert (found.batch_size, found.flips, found.foreground) == (8, True, (7,))
    assert (found.target, found.json, found.fuse, found.lr) == (("lin1",), False, False, 0.1)
    assert (found.data, found.bands) == (Path("photos"), "010")


@pytest.mark.parametrize(
    "content", ["", "\n# nothing\n", "{}", "---\n"], ids=["empty", "comment", "json", "document"]
)
def test_nothing_in_a_file_is_no_option(tmp_path, content):
    assert settings_from_file(written(tmp_path, content)) == {}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "content,pattern",
    [
        ("data: d\nepoch: 3", r"run\.yaml, line 2, has the unknown option 'epoch'; did you mean "),
        ('{"data": "d", "epoch": 3}', r"run\.yaml has the unknown option 'epoch'; did you mean "),
        ("qqqqqq: 3", "unknown option 'qqqqqq'; samfast finetune --help lists the options"),
        ("train: [a]", "unknown option 'train'"),
        ("epochs: many", "has epochs 'many'; expected a whole number"),
        ("batch_size: 2.5", "has batch_size '2.5'; expected a whole number"),
        ("batch_size: true", "has batch_size true; expected a whole number"),
        ("flips: 3", "has flips '3'; expected true or false"),
        ("flips: 'true'", "has flips 'true'; expected true or false"),
        ("lr: [1, 2]", "has lr a list; expected a number"),
        ("lr: {a: 1}", "has lr a mapping; expected a number"),
        ("foreground: [1, some]", "has foreground 'some'; expected a whole number or any"),
        ("foreground: [null]", "has foreground null; expected a whole number or any"),
        ("target: []", "has an empty list for target; give at least one value"),
        ("target: [[qkv]]", "has target a list; expected a text"),
        ("target: &a [*a]", "has target a list; expected a text"),
        ("output: ''", "has an empty output; give it a value"),
        ("data: !env HOME", "line 1, has the tag !env; write a plain value"),
        ("method: lroa", "unknown method 'lroa'; known are lora"),
        ("epochs: 0", "epochs is 0; it must be at least 1"),
        ("lr: .nan", "has lr '.nan'; expected a number"),
        ("epochs: 3\nlr: 1\nepochs: 4", "gives epochs twice in lines 1 and 3; keep one"),
        ('{"epochs": 3, "epochs": 4}', "gives epochs twice; keep one"),
        (
            "batch-size: 3\nbatch_size: 3",
            "gives batch-size and batch_size, one option, both in lines 1 and 2",
        ),
        ("[1, 2]", "is not a mapping of options to values"),
        ("- a\n- b", "is not a mapping of options to values"),
        ("[]", "is not a mapping of options to values"),
        ("null", "is not a mapping of options to values"),
        ("just words", "is not a mapping of options to values"),
        ("? [a]\n: 1", "line 1, has a key that is not the name of an option"),
        ("epochs: 3\nlr: [1", "is not valid YAML in line 2: "),
        ("epochs: 3\n--- \nlr: 1", "is not valid YAML in line 2: "),
        ("[" * 1_000, "is not valid YAML: it is nested too deeply"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is not a text file in UTF-8"),
        ("epochs: \x00", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(refused, tmp_path, content, pattern):
    path = written(tmp_path, content)
    refused("finetune", "--data", "d", "--config", path, pattern=pattern)


def test_a_file_that_is_not_there_or_given_twice(refused, tmp_path):
    missing = ("finetune", "--config", tmp_path / "none.yaml")
    refused(*missing, pattern=r"config .*none\.yaml does not exist")
    refused("finetune", "--config", tmp_path, pattern="is a folder, not a file")
    path = written(tmp_path, "data: d")
    twice = ("finetune", "--config", path, f"--config={path}")
    refused(*twice, pattern="--config is given twice")
    refused("finetune", "--config=", pattern="--config is empty")
    assert cli.main(["predict", "a.png", "--config", str(path)]) == 2


@pytest.mark.parametrize("old", OLD, ids=lambda old: old["argv"][-1])
def test_settings_of_an_older_run_give_its_settings_again(tmp_path, old):
    given = FinetuneSettings(**settings_from_file(written(tmp_path, old["saved"])))
    check_settings(given)
    assert (given.output, given.overwrite) == (None, False)  # where that run wrote
    then = replace(parsed(*old["argv"][1:]), output=None, overwrite=False)
    assert with_recipe(given) == with_recipe(then)


@pytest.mark.slow_on_cpu
def test_a_run_records_what_repeats_it(tmp_path, shared_data, capsys):
    output = tmp_path / "Übung \U0001f600"
    path = written(tmp_path, f"data: {shared_data}\nmethod: decoder\nlr: 1e-5\noutput: {output}")
    argv = ["finetune", "--config", str(path), *SMALL]
    assert cli.main(argv) == 0, capsys.readouterr().err
    record = output / "settings.json"
    saved = json.loads(record.read_text())
    assert saved["command"] == argv and saved["processes"] == 1
    assert saved["device"]["type"] in ("cpu", "cuda") and saved["device"]["name"]
    names = {"samfast", "python", "torch", "accelerate", "segment_anything", "numpy"}
    assert set(saved["versions"]) == names and all(saved["versions"].values())
    assert [key for key in saved if key in RECORDED] == list(RECORDED)
    again = parsed("--config", record)
    assert again.rank is None and again.lr == 1e-5  # not what the recipe filled in
    assert with_recipe(again) == with_recipe(replace(parsed(*argv[1:]), output=None))
    assert parsed("--config", record, "--method", "lora").method == "lora"
    assert parsed("--config", written(tmp_path, "resume: true")).resume == "newest"
    assert parsed("--config", written(tmp_path, "resume: false")).resume is None


def test_reading_needs_no_torch_and_yaml_only_for_a_file(tmp_path):
    path = written(tmp_path, WORDS)
    code = (
        "import sys; from samfast.cli import _parsed; _parsed(['finetune', '--data', 'd']); "
        "assert 'yaml' not in sys.modules; _parsed(['finetune', '--config', sys.argv[1]]); "
        "assert 'yaml' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)
