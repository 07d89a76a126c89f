# SPDX-License-Identifier: Apache-2.0
"""Build segment_anything's Sam at any size, from a checkpoint or with random weights."""

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
    """Build segment_anything's Sam, or Hugging Face's Sam3TrackerModel, on the CPU.

    name: "vit_tiny", "vit_b", "vit_l" or "vit_h"; or "sam3", whose checkpoint is a folder and whose
        image size is the folder's or a multiple of 336
    checkpoint: SAM's ``.pth``, a ``.safetensors`` file, or a Hugging Face ``SamModel`` folder
    image_size: a multiple of 16 (default: 1024, vit_tiny: 256). Positions of a checkpoint of
        another size are interpolated.
    random_init: use random weights instead of a checkpoint, as vit_tiny without one always does
    seed: seed of random weights, which leaves the global generator alone (default: draw from it)
    device: "meta" builds a random Sam without memory, to count its cost. sam3 then reads only the
        configuration of its checkpoint.

    ``sam.samfast_base`` records name, image_size, checkpoint (its file name) and seed; the last two
    are None if they do not apply. Raises ValueError or FileNotFoundError.
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
            sam = _construct(sizes, size).to(device)  # the pixel means are always on the CPU
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
    """Return the side in pixels of the square that `sam` sees."""
    size: int = sam_within(sam, ("image_encoder",)).image_encoder.img_size
    return size


def pixel_mean(sam: nn.Module) -> torch.Tensor:
    """Return what is subtracted from pixels, [3, 1, 1]; padding has this value."""
    return sam_within(sam, ()).pixel_mean


def _construct(sizes: Architecture, size: int) -> Foreign:
    """Build Sam as segment_anything's own builders do, at any size."""
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
    """Seed the CPU generator and restore it afterwards; do nothing if seed is None."""
    if seed is None:
        yield
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield


def _randomise(encoder: Foreign) -> None:
    """Initialise like a vision transformer: linear weights and positions N(0, 0.02²), biases 0.

    segment_anything starts the positions at zero. Tokens of a random encoder would then have no
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
