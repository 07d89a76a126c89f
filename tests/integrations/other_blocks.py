# SPDX-License-Identifier: Apache-2.0
"""Small encoders of the libraries whose blocks fuse knows, each with a padded window and a map."""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import segment_anything.modeling
import torch
from torch import nn

SIZE, DEPTH = 80, 2
GRID = (5, 6)  # of the maps that blocks alone are given


class Kind(NamedTuple):
    """make: an encoder of images (B, 3, 80, 80)   blocks: where its blocks are   stock: the package
    that its classes are of"""

    make: object
    blocks: str
    package: str

    def encoder(self) -> nn.Module:
        """Float32, the same at every call, and no table or bias of zeros."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        return model

    def of(self, model: nn.Module):
        return model.get_submodule(self.blocks)

    def map_of(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        y = getattr(y, "last_hidden_state", y)
        return y if isinstance(y, torch.Tensor) else y[0]


def copied():
    """The package ``medical_sam``: segment_anything's sources under another name."""
    if "medical_sam" not in sys.modules:
        path = Path(segment_anything.modeling.__file__)
        spec = importlib.util.spec_from_file_location(
            "medical_sam", path, submodule_search_locations=[str(path.parent)]
        )
        sys.modules["medical_sam"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module("medical_sam.image_encoder").ImageEncoderViT


def high_quality():
    pytest.importorskip("timm")
    pytest.importorskip("segment_anything_hq")
    return importlib.import_module("segment_anything_hq.modeling.image_encoder").ImageEncoderViT


def as_segment_anything(found, **options):
    return found()(
        img_size=SIZE,
        embed_dim=32,
        depth=DEPTH,
        num_heads=2,
        mlp_ratio=2.0,
        out_chans=8,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
        **options,
    )


def hugging_face(prefix, attention, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{prefix}VisionConfig")(
        hidden_size=32,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        image_size=SIZE,
        window_size=3,
        global_attn_indexes=[1],
        mlp_dim=64,
        output_channels=8,
        attn_implementation=attention,
        **options,
    )
    return getattr(transformers, f"{prefix}VisionModel")(config)


def timm(**options):
    pytest.importorskip("timm")
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return VisionTransformerSAM(
        img_size=SIZE,
        num_classes=0,
        embed_dim=32,
        depth=DEPTH,
        num_heads=2,
        mlp_ratio=2.0,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
        neck_chans=8,
        **options,
    )


KINDS = {
    "copy": Kind(functools.partial(as_segment_anything, copied), "blocks", "medical_sam"),
    "hq": Kind(
        functools.partial(as_segment_anything, high_quality), "blocks", "segment_anything_hq"
    ),
    "eager": Kind(
        functools.partial(hugging_face, "Sam", "eager"), "vision_encoder.layers", "transformers"
    ),
    "sdpa": Kind(
        functools.partial(hugging_face, "Sam", "sdpa"), "vision_encoder.layers", "transformers"
    ),
    "sam-hq": Kind(
        functools.partial(hugging_face, "SamHQ", "sdpa"), "vision_encoder.layers", "transformers"
    ),
    "timm": Kind(timm, "blocks", "timm"),
}


def images(batch=2):
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def maps(batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, *GRID, 32, generator=generator, dtype=torch.float64).to(dtype)
