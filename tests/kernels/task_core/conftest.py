# SPDX-License-Identifier: Apache-2.0
"""Interpreted programs take long: fewer parts of a gradient, of which each still has several tiles,
or none."""

import pytest
import torch

from .cases import runnable


@pytest.fixture(autouse=True)
def fewer_parts(monkeypatch):
    if not torch.cuda.is_available() and runnable("triton") is None:
        from samfast.kernels.task_core import triton_kernels

        monkeypatch.setattr(triton_kernels, "PARTS", 3)
