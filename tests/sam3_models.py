# SPDX-License-Identifier: Apache-2.0
"""Small models of Hugging Face's SAM 3, with rotary positions that float64 turns in float64."""

import copy
import functools

import torch

from samfast.integrations.torchvision import declare_missing_schemas

SIDE, UNIT, CHANNELS = 56, 28, 32  # UNIT: of a window of 2 patches of 14 pixels
THREE, FOUR = (4.0, 2.0, 1.0), (4.0, 2.0, 1.0, 0.5)


def exact_in_float64(module, name):
    """Rotary positions that transformers and sam3 turn in float32 whatever the model's dtype is."""
    theirs = getattr(module, name)
    if hasattr(theirs, "theirs"):
        return

    def turn(t, cos, sin):
        a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    def ours(q, k, *tables, **named):
        if q.dtype != torch.float64:
            return theirs(q, k, *tables, **named)
        every = [*tables, *named.values()]
        cos, sin = every if len(every) == 2 else torch.view_as_real(every[0]).unbind(-1)
        every = [t.double()[..., :: t.shape[-1] // (q.shape[-1] // 2)] for t in (cos, sin)]
        return turn(q, *every), turn(k, *every)

    ours.theirs = theirs
    setattr(module, name, ours)


def configuration(side=SIDE, factors=FOUR, depth=2, width=32, **vit):
    """Of a tracker: one windowed layer, and a global one behind it."""
    declare_missing_schemas()
    import transformers

    grid = side // 14
    backbone = {
        "hidden_size": width,
        "intermediate_size": 2 * width + 8,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "image_size": side,
        "pretrain_image_size": UNIT,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [1],
        **vit,
    }
    vision = transformers.Sam3VisionConfig(
        backbone_config=transformers.Sam3ViTConfig(**backbone),
        fpn_hidden_size=CHANNELS,
        backbone_feature_sizes=[[factor * grid] * 2 for factor in (4, 2, 1)],
        scale_factors=list(factors),
    )
    decoder = {
        "hidden_size": CHANNELS,
        "num_attention_heads": 2,
        "mlp_dim": 32,
        "iou_head_hidden_dim": 32,
    }
    prompts = {"hidden_size": CHANNELS, "image_size": side, "patch_size": 14}
    return transformers.Sam3TrackerConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )


def tracker(factors=FOUR, seed=0, **options):
    """A Sam3TrackerModel in eval mode: numbers that matter, the same at every call."""
    return copy.deepcopy(_made(factors, seed, tuple(options.items())))


@functools.cache
def _made(factors, seed, options):
    config = configuration(factors=factors, **dict(options))
    import transformers
    from transformers.models.sam3 import modeling_sam3

    exact_in_float64(modeling_sam3, "apply_rotary_pos_emb_2d")
    model = transformers.Sam3TrackerModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if not isinstance(t, torch.nn.Parameter) and "positional_embedding" not in name:
                continue  # tables of rotary positions
            std = 1.0 if "positional_embedding" in name else 0.1
            start = float("norm" in name and name.endswith("weight"))
            t.copy_(start + std * torch.randn(t.shape, generator=generator, dtype=torch.float64))
    return model.eval()
