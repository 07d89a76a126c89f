# SPDX-License-Identifier: Apache-2.0
"""Interpreted kernels run under guard in every test here, programs in shuffled order."""

import importlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "kernels"

# Triton decides at a module's import whether its kernels are interpreted. Beside a GPU none may be
# imported first by a test that sets the variable for a moment: it would stay interpreted.
if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    for path in sorted(KERNELS.glob("*/triton_*.py")):
        importlib.import_module(f"samfast.kernels.{path.parent.name}.{path.stem}")


@pytest.fixture(autouse=True)
def guarded_kernels():
    """The Guard of the test, or None where kernels are compiled or Triton is absent."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
        yield None
        return
    try:
        from guarded import guarded
    except ImportError:  # no Triton: its tests skip with their own sentence
        yield None
        return
    with guarded("shuffled", poison=False) as guard:
        yield guard
