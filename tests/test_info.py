# SPDX-License-Identifier: Apache-2.0
"""``samfast info`` beside a torchvision whose operators load, do not load, or that is absent."""

import importlib.metadata
import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from samfast import info
from samfast.integrations import torchvision as ours

pytest.importorskip("torchvision", reason="torchvision is not installed")


def foreign(path):
    raise OSError("undefined symbol")


LIBRARIES = {"built for this torch": lambda path: None, "built for another": foreign}


def sentence():
    version = importlib.metadata.version("torchvision")
    return (
        f"torchvision {version} was not built for torch {torch.__version__}, so its operators are "
        'missing; install the torchvision built for this torch (pytorch.org, "Get started"); '
        "samfast works without them"
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_missing_operators_are_told_in_one_line(library, monkeypatch, capsys):
    monkeypatch.setattr(torch.ops, "load_library", LIBRARIES[library])
    told = [sentence()] if library == "built for another" else []
    assert info.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "torchvision" in line and "operators" in line] == told
    assert info.main(json=True) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["torchvision_problem"] == (told[0] if told else None)


def test_nothing_is_told_without_torchvision(monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", foreign)
    monkeypatch.setattr(ours, "installed", lambda name: False)
    assert ours.operators_problem() is None


def test_it_agrees_with_torchvision():
    """Whichever builds are installed here."""
    ours.declare_missing_schemas()
    import torchvision

    assert (ours.operators_problem() is None) == torchvision.extension._has_ops()


@pytest.mark.parametrize("name", ["_C", "_C_stable"])
def test_the_library_is_found_by_either_name(name, tmp_path, monkeypatch):
    """Missed, its operators would be declared twice, and torch ends the process."""
    (tmp_path / f"{name}.so").touch()
    (tmp_path / "image.so").touch()
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    loaded = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: package)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert ours.operators_problem() is None
    assert loaded == [str(tmp_path / f"{name}.so")]
