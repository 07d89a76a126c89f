# SPDX-License-Identifier: Apache-2.0
"""Every code block and every command of README, CONTRIBUTING and docs does what the text says.

Commands run as they stand, on the stand-ins of tests/documents.py. `finetune` also gets LESS, the
targets of `make` and the benchmarks start without doing their work, and `pip` installs nothing.
Profilers for GPUs do not start; the ranges and kernels that their commands name are looked up.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from documents import DOCUMENTS, PLACE, ROOT, blocks, is_tasks, use_small_vit_b, write_stand_ins
from packaging.requirements import Requirement
from project_file import project

from benchmarks.options import parsed
from samfast import cli
from samfast.kernels import operations
from samfast.models import architectures
from samfast.modules import SamBlock
from samfast.profiling import machine
from samfast.training.tasks import read_tasks

LESS = ("--epochs", "1", "--repeats", "1", "--overlays", "1")
SLOW = (
    *("--dry-run", "--image-size 256", "--method conv-lora", "--method ta-lora", "--compare"),
    *("--trace profile.json", "--save-every", "--masks instances", "--automatic", "--stacks"),
    *("merge --adapter", "export --adapter"),
)
ALL = [block for document in DOCUMENTS for block in blocks(document)]
SHELL = {b.source: b for b in reversed(ALL) if b.language in ("sh", "inline")}.values()
LONG = [b for b in SHELL if any(map(b.source.count, SLOW))]
SLOW_PYTHON = ("docs/profiling.md", "docs/extend/operation.md")
PYTHON: dict[str, list[str]] = {}  # by the name of a run: the documents whose Python runs there
for found in sorted({b.document for b in ALL if b.language == "python"}, key=DOCUMENTS.index):
    alone = found == "README.md" or found in SLOW_PYTHON
    PYTHON.setdefault(found if alone else "pages", []).append(found)
PARTS = "forward backward norm1 qkv attention proj norm2 lin1 gelu lin2 side add".split()
SHOWN = [f"samfast/sam_block/{part}" for part in PARTS]
KERNELS = {  # by operation
    name: sorted(
        kernel
        for path in (ROOT / "kernels" / name).glob("triton_*.py")
        for kernel in re.findall(
            r"^@triton\.jit\(launch_metadata.*\)\ndef (\w+)\(", path.read_text(), re.M
        )
    )
    for name in operations("launches.py")
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A reader's folder; vit_b is small for as long as it is used."""
    folder = tmp_path_factory.mktemp("reader")
    threads, vit_b = torch.get_num_threads(), architectures.ARCHITECTURES["vit_b"]
    ceilings = machine.PRODUCTS["cpu"], machine.COPIED["cpu"], machine._TURN
    torch.set_num_threads(1)  # models this small gain nothing from more
    use_small_vit_b()
    write_stand_ins(folder)
    yield folder
    architectures.ARCHITECTURES["vit_b"] = vit_b
    machine.PRODUCTS["cpu"], machine.COPIED["cpu"], machine._TURN = ceilings
    torch.set_num_threads(threads)


@pytest.fixture
def reader(stand_ins, monkeypatch) -> Path:
    monkeypatch.chdir(stand_ins)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which tests set and readers do not
    monkeypatch.setenv("SAMFAST_CACHE", str(stand_ins / "cache"))
    return stand_ins


def test_no_block_goes_unseen():
    for document in DOCUMENTS:
        text = (PLACE / document).read_text(encoding="utf-8")
        own = [block for block in ALL if block.document == document]
        assert text.count("```") == 2 * sum(block.language != "inline" for block in own), document
    assert {block.language for block in ALL} == {"python", "sh", "yaml", "inline"}


@pytest.mark.parametrize(
    "documents",
    [
        pytest.param(documents, id=name, marks=[] if name == "README.md" else [pytest.mark.slow])
        for name, documents in PYTHON.items()
    ],
)
def test_python(documents, reader):
    """In a process of its own, where nothing has mended torchvision before README's first block."""
    command = [sys.executable, str(ROOT / "tests" / "documents.py"), *documents]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    wanted = [b for d in documents for b in ALL if (b.language, b.document) == ("python", d)]
    assert ran == [f"ran {b}" for b in wanted]


YAML = [block for block in ALL if block.language == "yaml"]


@pytest.mark.parametrize("block", [b for b in YAML if not is_tasks(b)], ids=str)
def test_accelerate_s_yaml(block, tmp_path):
    path = tmp_path / "accelerate.yaml"
    path.write_text(block.source)
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    kinds = {"MULTI_GPU": {}, "FSDP": {"fsdp_transformer_layer_cls_to_wrap": SamBlock.__name__}}
    assert kinds[config.distributed_type].items() <= config.fsdp_config.items()


@pytest.mark.parametrize("block", [b for b in YAML if is_tasks(b)], ids=str)
def test_yaml(block, tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text(block.source)
    names = re.findall(r"- name: (\w+)", block.source)
    assert [spec.name for spec in read_tasks(path)] == names


def test_profiling_names_every_kernel():
    """Those that are launched, which are those that tell a profiler what they cost."""
    text = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (`\w+_kernel`.*) \|$", text, re.M)
    own = {name: kernels for name, kernels in KERNELS.items() if kernels}  # not another's
    assert {name: re.findall(r"`(\w+)`", kernels) for name, kernels in rows} == own


def test_options_of_long_commands():
    """Those that `make test` does not run are at least parsed."""
    lines = [line for block in LONG for line in block.source.splitlines() if "samfast " in line]
    assert len(lines) >= len(LONG)
    for line in lines:
        assert cli._parsed(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=str(b), marks=[pytest.mark.slow] if b in LONG else []) for b in SHELL],
)
def test_commands(block, reader, monkeypatch):
    for line in filter(None, block.source.splitlines()):
        program, *arguments = shlex.split(line, comments=True)
        while "=" in program:
            monkeypatch.setenv(*program.split("=", 1))
            program, *arguments = arguments
        START[program](arguments)


def samfast(arguments):
    if arguments in (
        ["finetune"],
        ["evaluate"],
        ["predict"],
        ["merge"],
        ["export"],
        ["profile"],
    ):  # named in the text
        arguments = [*arguments, "--help"]
    if arguments[0] == "warmup":  # needs a GPU
        assert cli._parsed(arguments)
        return
    if arguments[0] == "finetune" and not {"--help", "--dry-run"} & set(arguments):
        arguments = [*arguments, *LESS]
    if arguments[0] == "profile" and "--image-size" in arguments:
        arguments[arguments.index("--image-size") + 1] = "64"
    assert cli.main(arguments) == 0


def torchrun(arguments):
    """tests/training/test_ranks.py starts several processes."""
    assert arguments[:3] == ["--nproc-per-node", "2", "-m"] and arguments[3] == "samfast"
    assert cli._parsed(arguments[4:])


def accelerate(arguments):
    launched = launch_command_parser().parse_args(arguments[1:])
    assert arguments[0] == "launch" and launched.module
    assert launched.training_script == "samfast" and cli._parsed(launched.training_script_args)


def make(arguments):
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    command = ["make", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def python(arguments):
    """Benchmarks read their options and go no further; goals, which only reads, runs. Of a file it
    is that there is one."""
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file()
        return
    module = importlib.import_module(arguments[1])
    (results, *_) = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
    arguments = [re.sub(r"\S*<gpu>\.csv", str(results), argument) for argument in arguments[2:]]
    if hasattr(module, "Settings"):
        parsed(module.Settings, arguments)
    elif hasattr(module, "parsed"):
        module.parsed(arguments)
    elif arguments:
        module.main(arguments)
    else:
        with pytest.raises(SystemExit) as stop:
            module.main(["--help"])
        assert stop.value.code == 0


def pip(arguments):
    assert arguments[0] == "install"
    command = [sys.executable, "-m", "pip", "install", "--help"]
    known = subprocess.run(command, capture_output=True, text=True)
    if known.returncode:
        pytest.skip("there is no pip in this environment")
    dependencies = [Requirement(line).name for line in project()["dependencies"]]
    for argument in arguments[1:]:
        if argument.startswith("-"):
            assert argument in re.findall(r"--?[\w-]+", known.stdout)
        elif argument.startswith("."):
            extras = re.fullmatch(r"\.(?:\[(.*)\])?", argument)[1] or ""
            assert set(filter(None, extras.split(","))) <= set(project()["optional-dependencies"])
        else:
            assert Requirement(argument).name in [*dependencies, "setuptools"]


def pytest_(arguments):
    """Its options are those that tests/conftest.py adds."""
    options = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    paths = [argument for argument in arguments if not argument.isdigit()]
    for argument in paths:
        found = f'"{argument}"' in options if argument[0] == "-" else (ROOT / argument).exists()
        assert found, argument


def nsys(arguments):
    if arguments[0] == "profile":
        assert arguments[-2:] == ["python", "step.py"]
    else:
        assert arguments[0] == "stats" and arguments[-1] == "step.nsys-rep"


def ncu(arguments):
    """Names of ranges have their slashes escaped; a single one ends in one that is not."""
    options = dict(pairwise(arguments))
    assert arguments[-2:] == ["python", "step.py"]
    if pattern := options.get("--nvtx-include"):
        ranges = re.split(r"(?<!\\)/", pattern)
        assert ranges.pop() == "" if len(ranges) == 2 else ranges.pop(1) == "*"
        for name in ranges:
            assert name.replace("\\/", "/") in SHOWN
    if name := options.get("--kernel-name"):
        wanted = re.compile(name.removeprefix("regex:"))
        found = [k for ks in KERNELS.values() for k in ks if wanted.search(k)]
        assert found == ["dkv_kernel", "dq_kernel"]


def proton(arguments):
    profiler = pytest.importorskip("triton.profiler.proton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["proton", *arguments])
        options, rest = profiler.parse_arguments()
    assert (options.hook, options.name, rest) == ("triton", "step", ["step.py"])


def proton_viewer(arguments):
    assert arguments[0] == "-m" and arguments[2] == "step.hatchet"


START = {
    "samfast": samfast,
    "torchrun": torchrun,
    "accelerate": accelerate,
    "make": make,
    "python": python,
    "python3": python,
    "pip": pip,
    "pytest": pytest_,
    "nsys": nsys,
    "ncu": ncu,
    "proton": proton,
    "proton-viewer": proton_viewer,
}
