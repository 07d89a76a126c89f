# SPDX-License-Identifier: Apache-2.0
"""Names of Hugging Face's ``SamModel`` in segment_anything's spelling, and back.

The tensors are the same, only their names differ. One number outside the files differs too: beside
these weights Hugging Face runs the norms of the decoder's transformer with the eps of its
configuration (1e-6 by default), segment_anything with the 1e-5 that SAM was trained with.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")
_SHARED = "shared_image_embedding.positional_embedding"
_TIED = "prompt_encoder.shared_embedding.positional_embedding"
_MATRIX = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_MLP = r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))"

# How a name begins -> what stands there in segment_anything; the rest of the name is kept.
_RULES = [
    (re.compile(pattern + r"(?=\.|$)"), replacement)
    for pattern, replacement in [
        (re.escape(_SHARED), _MATRIX),
        (re.escape(_TIED), _MATRIX),
        (r"prompt_encoder\.point_embed", "prompt_encoder.point_embeddings"),
        (r"prompt_encoder\.mask_embed\.conv1", "prompt_encoder.mask_downscaling.0"),
        (r"prompt_encoder\.mask_embed\.layer_norm1", "prompt_encoder.mask_downscaling.1"),
        (r"prompt_encoder\.mask_embed\.conv2", "prompt_encoder.mask_downscaling.3"),
        (r"prompt_encoder\.mask_embed\.layer_norm2", "prompt_encoder.mask_downscaling.4"),
        (r"prompt_encoder\.mask_embed\.conv3", "prompt_encoder.mask_downscaling.6"),
        (r"vision_encoder\.patch_embed\.projection", "image_encoder.patch_embed.proj"),
        (r"vision_encoder\.layers\.(\d+)\.layer_norm([12])", r"image_encoder.blocks.\1.norm\2"),
        (r"vision_encoder\.layers", "image_encoder.blocks"),
        (r"vision_encoder\.neck\.conv1", "image_encoder.neck.0"),
        (r"vision_encoder\.neck\.layer_norm1", "image_encoder.neck.1"),
        (r"vision_encoder\.neck\.conv2", "image_encoder.neck.2"),
        (r"vision_encoder\.neck\.layer_norm2", "image_encoder.neck.3"),
        (r"vision_encoder", "image_encoder"),
        (
            r"mask_decoder\.transformer\.layers\.(\d+)\.layer_norm([1-4])",
            r"mask_decoder.transformer.layers.\1.norm\2",
        ),
        (
            r"mask_decoder\.transformer\.layer_norm_final_attn",
            "mask_decoder.transformer.norm_final_attn",
        ),
        (r"mask_decoder\.upscale_conv1", "mask_decoder.output_upscaling.0"),
        (r"mask_decoder\.upscale_layer_norm", "mask_decoder.output_upscaling.1"),
        (r"mask_decoder\.upscale_conv2", "mask_decoder.output_upscaling.3"),
        # Perceptrons of three layers: proj_in, layers.0 and proj_out are layers 0, 1 and 2.
        (_MLP + r"\.proj_in", r"\1.layers.0"),
        (_MLP + r"\.layers\.0", r"\1.layers.1"),
        (_MLP + r"\.proj_out", r"\1.layers.2"),
    ]
]


def is_hugging_face(names: Iterable[str]) -> bool:
    return any(name.startswith("vision_encoder.") for name in names)


def to_segment_anything(state: Mapping[str, Value]) -> dict[str, Value]:
    """The same tensors by segment_anything's names; names without a rule stay as they are."""
    return {other: state[name] for name, other in spellings(state).items()}


def spellings(names: Collection[str]) -> dict[str, str]:
    """segment_anything's name by Hugging Face's; of one tensor's two names the first alone."""
    return {name: spelled(name) for name in names if name != _TIED or _SHARED not in names}


def spelled(name: str) -> str:
    """A name, of a tensor or a module, as segment_anything spells it."""
    for pattern, replacement in _RULES:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name


def spelled_back(name: str, known: Mapping[str, str]) -> str:
    """segment_anything's name, of a tensor or a module, as Hugging Face spells it.

    known: Hugging Face's name by segment_anything's, of a model's modules and tensors. What has no
        such name is inside of the nearest module that has one.
    """
    head, tail = name, ""
    while head:
        if head in known:
            return known[head] + tail
        head, _, leaf = head.rpartition(".")
        tail = f".{leaf}{tail}"
    return name
