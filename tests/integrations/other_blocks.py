# SPDX-License-Identifier: Apache-2.0
"""Small encoders of the libraries whose blocks fuse knows, each with a padded window and a map."""

import functools
import importlib.util
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import segment_anything.modeling
import torch
from sam3_models import exact_in_float64
from torch import nn

SIZE, DEPTH = 80, 2
GRID = (5, 6)  # of the maps that blocks alone are given


class Kind(NamedTuple):
    """make: an encoder of images (B, 3, 80, 80)   blocks: where its blocks are   stock: the package
    that its classes are of   linears: what it calls its linear layers   grid: of the maps that its
    blocks take"""

    make: object
    blocks: str
    package: str
    linears: tuple[str, ...] = ("qkv", "attn.proj", "lin1", "lin2")
    grid: tuple[int, int] = GRID

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


def sam3_of_transformers(attention, **options):
    transformers = pytest.importorskip("transformers")
    from transformers.models.sam3 import modeling_sam3

    exact_in_float64(modeling_sam3, "apply_rotary_pos_emb_2d")
    vit = transformers.Sam3ViTConfig(
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        image_size=SIZE,
        pretrain_image_size=SIZE // 2,
        patch_size=16,
        window_size=3,
        global_attn_indexes=[1],
        attn_implementation=attention,
        **options,
    )
    return modeling_sam3.Sam3ViTModel(vit)


def vitdet():
    """sam3's file of vision blocks by itself: the package imports a dozen others."""
    pytest.importorskip("timm")
    if "sam3" not in sys.modules:
        folder = Path(sys.prefix) / "sam3" / "sam3"  # where make puts it
        if not folder.is_dir():
            found = importlib.util.find_spec("sam3")
            if found is None:
                pytest.skip("sam3 is not installed: pip install --no-deps sam3==0.1.4")
            folder = Path(found.submodule_search_locations[0])
        for name, path in (("sam3", folder), ("sam3.model", folder / "model")):
            sys.modules[name] = module = types.ModuleType(name)
            module.__path__ = [str(path)]
    module = importlib.import_module("sam3.model.vitdet")
    exact_in_float64(module, "apply_rotary_enc")
    return module


def meta(**options):
    """SAM 3's encoder in its authors' package, small."""
    return vitdet().ViT(
        img_size=SIZE,
        pretrain_img_size=SIZE // 2,
        patch_size=16,
        embed_dim=32,
        depth=DEPTH,
        num_heads=2,
        mlp_ratio=2.25,
        use_abs_pos=True,
        tile_abs_pos=True,
        rel_pos_blocks=(),
        global_att_blocks=(1,),
        window_size=3,
        use_rope=True,
        use_interp_rope=True,
        retain_cls_token=False,
        ln_pre=True,
        **options,
    )


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
    "timm": Kind(timm, "blocks", "timm", ("qkv", "attn.proj", "fc1", "fc2")),
    "sam3": Kind(
        functools.partial(sam3_of_transformers, "sdpa"),
        "layers",
        "transformers",
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        (5, 5),
    ),
    "sam3-eager": Kind(
        functools.partial(sam3_of_transformers, "eager"),
        "layers",
        "transformers",
        ("q_proj", "v_proj", "fc2"),
        (5, 5),
    ),
    "meta": Kind(meta, "blocks", "sam3", ("qkv", "attn.proj", "fc1", "fc2"), (5, 5)),
}


def images(batch=2):
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def maps(batch=2, dtype=torch.float64, grid=GRID):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, *grid, 32, generator=generator, dtype=torch.float64).to(dtype)
