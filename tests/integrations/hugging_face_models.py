# SPDX-License-Identifier: Apache-2.0
"""Small models of Hugging Face's SAM, segment_anything's twin of one, and prompts for both."""

import copy
import functools

import torch
from segment_anything import modeling
from torch import nn
from torch.nn import functional as F
from transformers import SamConfig, SamHQConfig, SamHQModel, SamModel

from samfast.models.hf_names import to_segment_anything

SIDE = 64
CHANNELS = 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
KINDS = {"sam": (SamConfig, SamModel), "hq": (SamHQConfig, SamHQModel)}


def model(kind="sam", eps=1e-6, seed=0, global_blocks=(1,)):
    """A padded window of three and a global block; numbers that matter, the same at every call."""
    return copy.deepcopy(_made(kind, eps, seed, global_blocks))


@functools.cache
def _made(kind, eps, seed, global_blocks):
    config_of, model_of = KINDS[kind]
    torch.manual_seed(seed)
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "window_size": 3,
        "global_attn_indexes": list(global_blocks),
        "mlp_ratio": 2.0,
        "output_channels": CHANNELS,
        "num_pos_feats": CHANNELS // 2,
    }
    decoder = {
        "hidden_size": CHANNELS,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 32,
        "layer_norm_eps": eps,
        **({"vit_dim": 32} if kind == "hq" else {}),
    }
    prompts = {"hidden_size": CHANNELS, "image_size": SIDE}
    made = model_of(
        config_of(vision_config=encoder, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            std = 1.0 if "positional" in name else 0.1
            start = float("norm" in name and name.endswith("weight"))
            parameter.copy_(start + std * torch.randn(parameter.shape, dtype=torch.float64))
    return made.eval()


def twin(of):
    """segment_anything's Sam with the weights of a SamModel whose eps is segment_anything's."""
    side, grid = of.vision_encoder.image_size, of.vision_encoder.image_size // 16
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=side,
            embed_dim=32,
            depth=2,
            num_heads=2,
            mlp_ratio=2.0,
            out_chans=CHANNELS,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=modeling.PromptEncoder(CHANNELS, (grid, grid), (side, side), 16),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=CHANNELS,
            transformer=modeling.TwoWayTransformer(2, CHANNELS, 2, 32),
            iou_head_hidden_dim=32,
        ),
        pixel_mean=list(MEAN),
        pixel_std=list(STD),
    )
    sam.load_state_dict(to_segment_anything(of.state_dict()))
    return sam.eval()


def double(of):
    return copy.deepcopy(of).double()


def images(batch=2, size=(50, SIDE)):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)


def prompts(kind, batch=2, count=3, size=(50, SIDE)):
    """segment's arguments; one of the points is padding."""
    generator = torch.Generator().manual_seed(6)
    scale = torch.tensor(size[::-1])

    def coordinates(*shape):
        return (torch.rand(*shape, 2, generator=generator) * scale * 8).floor() / 8

    boxes = coordinates(batch, count, 2).sort(dim=2).values.flatten(2)
    labels = torch.randint(0, 2, (batch, count, 2), generator=generator)
    labels[0, 0, 1] = -1
    points = coordinates(batch, count, 2), labels
    return {
        "none": {},
        "boxes": {"boxes": boxes},
        "points": {"points": points},
        "both": {"boxes": boxes, "points": points},
    }[kind]


def own_forward(of, images, boxes=None, points=None):
    """Logits by the model's own forward, enlarged as its processor does."""
    like = of.shared_image_embedding.positional_embedding
    mean, std = (torch.tensor(values).to(like).view(3, 1, 1) for values in (MEAN, STD))
    side, (height, width) = of.vision_encoder.image_size, images.shape[2:]
    pixels = F.pad((images.to(like) - mean) / std, (0, side - width, 0, side - height))
    coords, labels = points or (None, None)
    masks = of(
        pixel_values=pixels,
        input_boxes=boxes,
        input_points=coords,
        input_labels=labels,
        multimask_output=False,
    ).pred_masks[:, :, 0]
    masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)
    return masks[..., :height, :width]


def run(function, of, images, **arguments):
    """Logits, and the gradients of parameters that are not zero."""
    of.zero_grad()
    logits = function(of, images, **arguments)
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=torch.float64)
    (logits * weights.to(logits)).sum().backward()
    grads = {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **{n: g for n, g in grads.items() if g.any()}}
