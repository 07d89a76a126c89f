# SPDX-License-Identifier: Apache-2.0
"""Interpreted kernels run under guard in every test here, programs in shuffled order."""

import os

import pytest
import torch


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
