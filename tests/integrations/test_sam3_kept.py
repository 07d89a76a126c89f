# SPDX-License-Identifier: Apache-2.0
"""What SAM 3's fused encoder keeps for its backward, in elements a token and block."""

import pytest
import torch

import samfast
from samfast.counters import saved_bytes

TARGET = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
GOALS = {"fast": 1.05 * 10.6, "balanced": 1.05 * 3, "minimal": 1.1}  # of D, MLP 4.625 · D wide
DEPTH, GLOBAL = 4, [3]


def kept(memory, device, width, side, patch, dtype):
    """Hooks' and living bytes of one forward, as elements a token and block in units of D."""
    pytest.importorskip("transformers")
    from transformers import Sam3ViTConfig
    from transformers.models.sam3 import modeling_sam3

    config = Sam3ViTConfig(
        hidden_size=width,
        intermediate_size=int(4.625 * width),
        num_hidden_layers=DEPTH,
        num_attention_heads=width // 64,
        image_size=side,
        patch_size=patch,
        window_size=24,
        global_attn_indexes=GLOBAL,
    )
    with torch.device(device):
        model = modeling_sam3.Sam3ViTModel(config)
    model = samfast.attach(model, samfast.Lora(rank=4, target=TARGET), train=(), base_dtype=dtype)
    samfast.fuse(model, memory=memory)
    x = torch.zeros(1, (side // patch) ** 2, width, device=device, dtype=dtype)
    x = x.view(1, side // patch, side // patch, width).requires_grad_()

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = x
            for layer in model.layers:
                y = layer(y)
            return y

    found = saved_bytes(run, [*model.parameters(), *model.buffers()])
    unit = DEPTH * x.numel() * x.element_size()
    return found.hooks / unit, found.living / unit


@pytest.mark.slow_on_cpu(but=["minimal"])
@pytest.mark.parametrize("memory", GOALS)
def test_the_goal_at_full_size(memory):
    """SAM 3's width and tokens at 1008², bfloat16, on tensors without memory."""
    hooks, living = kept(memory, "meta", 1024, 1008, 14, torch.bfloat16)
    assert living - 1 / DEPTH <= hooks <= GOALS[memory]


@pytest.mark.slow_on_cpu(but=["balanced"])
@pytest.mark.parametrize("memory", GOALS)
def test_a_cpu_keeps_what_tensors_without_memory_say(memory):
    """The same Function on real tensors of a smaller width: hooks and living storages."""
    sizes = 64, 48, 1, torch.float32
    meta, real = (kept(memory, device, *sizes) for device in ("meta", "cpu"))
    assert real == meta
    assert real[0] - real[1] <= 1 / DEPTH  # the first block's input, which was there before
