# SPDX-License-Identifier: Apache-2.0
"""What a fused encoder keeps for its backward at 1024², counted on tensors without memory."""

import pytest
import torch

import samfast
from benchmarks import saved
from benchmarks.peers import sharing
from samfast.kernels.sam_block.plan import MEMORY

MOST = {"vit_b": 1.10, "vit_l": 1.10, "vit_h": 1.05}  # of the floor, for "fast"


@pytest.mark.parametrize("model", MOST)
def test_little_more_than_the_floor(model):
    """By what is passed to autograd, and by what is alive after the forward."""
    encoder = saved.encoder(model, torch.bfloat16)
    for memory in MEMORY if model == "vit_h" else ("fast",):
        fused = samfast.fuse(sharing(encoder), memory=memory)
        found = saved.counted(fused, torch.bfloat16)
        most = MOST[model] if memory == "fast" else 1.10
        assert found.living == found.hooks
        assert found.hooks <= most * saved.floor(fused, memory, torch.bfloat16)
