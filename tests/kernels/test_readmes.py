# SPDX-License-Identifier: Apache-2.0
"""Operations' READMEs have one order of sections, examples that run and files that exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
READMES = sorted(ROOT.glob("kernels/*/README.md"))
SECTIONS = [
    "What it computes",
    "Shapes and usage",
    "On a CPU",
    "On a GPU",
    "Saved for backward",
    "Predicted and measured",
    "Tried and lost",
    "Source",
]
OPTIONAL = {"Tried and lost", "Source"}
each_readme = pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)


def test_every_operation_has_one():
    operations = {path.parent for path in ROOT.glob("kernels/*/reference.py")}
    assert operations == {path.parent for path in READMES}


@each_readme
def test_sections(path):
    found = re.findall(r"^## (.+)$", path.read_text(encoding="utf-8"), re.M)
    assert found == [s for s in SECTIONS if s in found or s not in OPTIONAL]


@each_readme
def test_examples(path):
    """At 768 features and 64×64 tokens an example is slow only by its size."""
    sources = re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)
    assert sources or path.parent.name == "sam_block"  # which samfast.fuse calls
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for source in sources:
            exec(compile(source, str(path), "exec"), {})
    finally:
        torch.set_num_threads(threads)


@each_readme
def test_files(path):
    rows = re.findall(r"^\| (`.+`) \|", path.read_text(encoding="utf-8"), re.M)
    named = [name for row in rows for name in re.findall(r"`([\w/.]+\.(?:py|cpp|cu|h|json))`", row)]
    missing = [n for n in named if not (path.parent / n).exists() and not (ROOT / n).exists()]
    assert not missing
