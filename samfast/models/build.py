# SPDX-License-Identifier: Apache-2.0
"""Builds segment_anything's Sam at any size, from a checkpoint or with random weights."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from samfast.adapters.foreign import Foreign
from samfast.integrations import segment_anything
from samfast.models.architectures import (
    CHANNELS,
    PATCH,
    Architecture,
    architecture,
    check_image_size,
)
from samfast.models.build_sam3 import build_sam3
from samfast.models.checkpoints import load_checkpoint
from samfast.models.reading import sam_within
from samfast.models.sam3_folder import NAME as SAM3

INIT_STD = 0.02


def build_sam(
    name: str,
    checkpoint: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    random_init: bool = False,
    seed: int | None = None,
    device: str = "cpu",
) -> nn.Module:
    """segment_anything's Sam `name` ("vit_tiny", "vit_b", "vit_l", "vit_h"), on the CPU; or "sam3",
    Hugging Face's Sam3TrackerModel, whose checkpoint is its folder and whose image size is the
    folder's or a multiple of 336.

    checkpoint: SAM's ``.pth``, a ``.safetensors`` file, or a Hugging Face ``SamModel`` folder.
    image_size: a multiple of 16; None is 1024, for vit_tiny 256. A checkpoint of another size has
    its positions interpolated.
    random_init: random weights instead of a checkpoint; vit_tiny without a checkpoint always has
    them. `seed` fixes them without touching the global generator; without it they come from there.
    device: "meta" makes a random Sam without memory, for counting what it would cost; sam3 then
        reads the configuration alone of its checkpoint.

    ``sam.samfast_base`` records name, image_size, checkpoint (its file name) and seed (both None
    where they do not apply). Raises ValueError or FileNotFoundError with one sentence.
    """
    sizes = architecture(name)
    if name != SAM3:
        size = check_image_size(sizes.image_size if image_size is None else image_size)
    if checkpoint is not None and random_init:
        raise ValueError(f"{name} cannot be random and from checkpoint {checkpoint}; give only one")
    if checkpoint is None and not random_init and name != "vit_tiny":
        raise ValueError(
            f"{name} needs a checkpoint (checkpoint=, --checkpoint), or random weights "
            "(random_init=True, --random-init)"
        )
    stored = checkpoint is not None and name != SAM3
    if device not in ("cpu", "meta") or (device == "meta" and stored):
        raise ValueError(
            f"device is {device!r}; Sam is built on the cpu, and without a checkpoint on meta"
        )
    if name == SAM3:
        seed = seed if checkpoint is None else None
        sam: Foreign = build_sam3(checkpoint, image_size, seed, device)
        size = sam.vision_encoder.backbone.config.image_size
    elif checkpoint is None:
        with torch.device(device), _generator(seed):
            sam = _construct(sizes, size).to(device)  # the means of pixels are always on the CPU
            _randomise(sam.image_encoder)
    else:
        seed = None
        with torch.device("meta"):
            sam = _construct(sizes, size)
        load_checkpoint(sam, name, checkpoint)
    sam.samfast_base = {
        "name": name,
        "image_size": size,
        "checkpoint": None if checkpoint is None else os.path.basename(os.path.abspath(checkpoint)),
        "seed": seed,
    }
    built: nn.Module = sam.eval()
    return built


def image_size(sam: nn.Module) -> int:
    """The side in pixels of the square that `sam` sees."""
    size: int = sam_within(sam, ("image_encoder",)).image_encoder.img_size
    return size


def pixel_mean(sam: nn.Module) -> torch.Tensor:
    """[3, 1, 1], what is subtracted from pixels: the value of padding."""
    return sam_within(sam, ()).pixel_mean


def _construct(sizes: Architecture, size: int) -> Foreign:
    """Sam as segment_anything's own builders make it, at any size."""
    modeling = segment_anything.load().modeling
    grid = size // PATCH
    return modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=size,
            patch_size=PATCH,
            embed_dim=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            mlp_ratio=4,
            out_chans=CHANNELS,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=sizes.window,
            global_attn_indexes=sizes.global_blocks,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=CHANNELS,
            image_embedding_size=(grid, grid),
            input_image_size=(size, size),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(
                depth=2, embedding_dim=CHANNELS, mlp_dim=2048, num_heads=8
            ),
            transformer_dim=CHANNELS,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )


@contextlib.contextmanager
def _generator(seed: int | None) -> Iterator[None]:
    """The CPU generator at `seed`, put back afterwards; as it is when seed is None."""
    if seed is None:
        yield
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield


def _randomise(encoder: Foreign) -> None:
    """The usual start of a vision transformer: linear weights and positions N(0, 0.02²), no biases.

    With segment_anything's zeros for the positions, the tokens of a random encoder would know no
    place, and adapters that leave the tables frozen could never learn one.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INIT_STD)
            nn.init.zeros_(module.bias)
    nn.init.normal_(encoder.pos_embed, std=INIT_STD)
    for block in encoder.blocks:
        nn.init.normal_(block.attn.rel_pos_h, std=INIT_STD)
        nn.init.normal_(block.attn.rel_pos_w, std=INIT_STD)
