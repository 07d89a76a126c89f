# SPDX-License-Identifier: Apache-2.0
"""What ``samfast.integrations.check`` prints, and that it says when something is wrong."""

import functools

import pytest
import torch
from torch import nn

from samfast.fused.block import FusedBlock
from samfast.integrations import check

NAMED = {library.name: library for library in check.LIBRARIES}


@pytest.fixture
def small(monkeypatch):
    """Bytes of an encoder that takes no seconds."""
    monkeypatch.setattr(check, "VIT_B", check.SMALL)


@pytest.mark.slow_on_cpu
def test_a_row(small, capsys):
    assert check.main(["--only", "timm"]) == 0
    row = capsys.readouterr().out
    assert row.startswith("timm samvit") and "2 of 2 blocks" in row and "same keys" in row
    before, after = (float(part) for part in row.split("same keys")[1].split(" MiB")[0].split("->"))
    assert 0 < after < before


def test_a_library_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert check.main(["--only", "timm"]) == 0
    assert capsys.readouterr().out.split() == ["timm", "samvit", "not", "installed:", "timm"]


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("fault", ["left alone", "another number"])
def test_a_fault(fault, small, monkeypatch, capsys):
    """A block that is not recognised, and one whose result is off by 1e-5."""
    if fault == "left alone":
        library = NAMED["timm samvit"]
        made = functools.partial(_with_scale, library.make)
        monkeypatch.setattr(check, "LIBRARIES", (library._replace(make=made),))
    else:
        calls = FusedBlock._fused
        monkeypatch.setattr(FusedBlock, "_fused", lambda self, x: calls(self, x) * 1.00001)
    assert check.main(["--only", "timm"]) == 1
    assert ("1 of 2 blocks" in capsys.readouterr().out) == (fault == "left alone")


def _with_scale(make, size):
    model = make(size)
    model.blocks[0].ls1 = nn.Hardtanh()
    return model


def test_the_output_of_encoders():
    """Tensors, outputs of transformers, and maps beside the last one."""
    x = torch.ones(1)
    assert check.output(lambda x: x, x) == [x]
    assert check.output(lambda x: {"last_hidden_state": x}, x) == [x]
    assert len(check.output(lambda x: (x, [x, x]), x)) == 3


@pytest.mark.slow
def test_every_library():
    assert check.main([]) == 0
