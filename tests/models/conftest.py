# SPDX-License-Identifier: Apache-2.0
"""A small SAM, built once."""

import pytest
import torch

from samfast.models import build_sam


@pytest.fixture(scope="session")
def tiny():
    """vit_tiny at 256; not to be written to."""
    return build_sam("vit_tiny", seed=0)


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small gain nothing from more, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
