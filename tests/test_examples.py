# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ run as they are and learn; its commands parse; its notebooks run."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT

from samfast import cli
from samfast.training.checks import check_settings
from samfast.training.tasks import read_tasks

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "images")
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.py"))
REPRODUCE = (EXAMPLES / "reproduce/README.md").read_text()
COMMANDS = re.findall(r"^samfast .*$", REPRODUCE, re.M)
ROWS = re.findall(r"^\| (.*) \| (.*) \| (no) \| (.*) \|$", REPRODUCE, re.M)
WHOLE = {"kvasir": 3_817_728, "isic": 4_020_096}  # published: adapters and decoder
PEERS = {"lora": 864, "adaptformer": 1_296}  # published: what COBOT adds to these on ViT-B
THREE_TASKS = 3_244_320  # published: TA-LoRA on ViT-L
NEEDS = {
    "peft_model": "peft",
    "lightning_module": "pytorch_lightning",
    "hugging_face_trainer": "transformers",
}


def ran(script: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": path_with(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # which tests set and readers do not
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def path_with(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.slow  # each imports torch and another library in a process of its own
def test_a_script_learns(script, tmp_path):
    pytest.importorskip(NEEDS.get(script, "samfast"))
    few = ["--epochs", "2"] if script == "plain_loop" else []
    printed = ran(script, tmp_path, *few)
    score = float(re.search(r"validation Dice\D* ([\d.]+);", printed)[1])
    assert score > (0.4 if few else 0.7), printed  # everything as foreground has about 0.3
    assert list((tmp_path / "runs").rglob("adapter_model.safetensors"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_parses(script):
    text = (EXAMPLES / f"{script}.py").read_text()
    assert len(text.splitlines()) <= 60
    assert f"python examples/{script}.py\n" in ast.get_docstring(ast.parse(text)) + "\n"
    for document in ("examples/README.md", "docs/examples.md"):
        assert f"{script}.py" in (ROOT / document).read_text(), document


def test_there_are_five():
    assert len(SCRIPTS) == 5 and len(NOTEBOOKS) == 2


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(re.findall(r"data (\w+)", c)))
def test_commands_of_reproduce_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = cli._parsed([*shlex.split(command)[1:], "--dry-run"])
    check_settings(settings)
    if settings.tasks:
        assert len(read_tasks(settings.tasks)) > 2


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(re.findall(r"data (\w+)", c)))
def test_a_published_score_stands_beside_each_command(command):
    data = re.search(r"--data (\w+)/", command)[1].replace("_", "-")
    rows = [row for row in ROWS if row[0].lower().replace("2017", "").strip() == data]
    assert rows, f"no row of a table names the data set {data}"
    for _, score, run, _ in rows:
        assert re.search(r"\d\.\d|score not found", score) and run == "no", (score, run)


def trained(command: str, capsys) -> int:
    """Parameters that a dry run counts."""
    assert cli.main([*shlex.split(command)[1:], "--dry-run", "--json"]) == 0
    return int(re.search(r'"trained_parameters": (\d+)', capsys.readouterr().out)[1])


@pytest.mark.slow  # counts a step of ViT-B, ViT-L and ViT-H
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(re.findall(r"data (\w+)", c)))
def test_trained_parameters_are_the_published_ones(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    count = trained(command, capsys)
    data, method = (re.search(rf"--{o} ([\w-]+)", command)[1] for o in ("data", "method"))
    if data in WHOLE:
        assert count == WHOLE[data]
    elif method == "ta-lora":
        other = command.replace("--method ta-lora --rank 32", "--method lora --rank 4")
        lora = 24 * 4 * (1024 + 3 * 1024)  # of rank 4 on packed qkv of ViT-L
        more = 24 * 4 * (len(read_tasks(other.split("--tasks ")[1].split()[0])) - 3)
        assert count - trained(other, capsys) + lora == THREE_TASKS + more
    else:
        peer = method.removeprefix("cobot-")
        plain = re.sub(r"--relation-lr \S+", "--slices q v" if peer == "lora" else "", command)
        assert count - trained(plain.replace(method, peer), capsys) == PEERS[peer]


@pytest.mark.slow  # where jupytext is installed; a kernel takes seconds to start
@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(source, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", path_with(ROOT))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    folder = {"metadata": {"path": str(source.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=folder).execute()


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_in_step_with_its_source(source):
    jupytext = pytest.importorskip("jupytext")
    text, notebook = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    cells = [[(cell.cell_type, cell.source) for cell in n.cells] for n in (text, notebook)]
    assert cells[0] == cells[1], "run jupytext --to ipynb --update on the .py file"
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert shown and not [output for output in shown if output.get("name") == "stderr"]
