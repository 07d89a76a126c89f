# SPDX-License-Identifier: Apache-2.0
"""Small SAMs, built once."""

import pytest
import torch
from stock_loop import SIDE
from stock_runs import double

from samfast.models import build_sam


@pytest.fixture(scope="session")
def tiny():
    """vit_tiny at 256; not to be written to."""
    return build_sam("vit_tiny", seed=0)


@pytest.fixture(scope="module")
def small():
    """A Sam of two blocks, one with windows and one without, for images of SIDE pixels."""
    sam = build_sam("vit_tiny", image_size=SIDE, seed=3)
    sam.image_encoder.blocks = sam.image_encoder.blocks[1:3]
    return sam


@pytest.fixture(scope="module")
def small_double(small):
    return double(small)


@pytest.fixture
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        yield
