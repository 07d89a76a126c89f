# SPDX-License-Identifier: Apache-2.0
"""Names of Hugging Face's ``SamModel`` in segment_anything's spelling, and back.

The tensors are the same; only their names differ. One number outside the files differs too: the eps
of the norms in the decoder's transformer. Hugging Face takes it from its configuration (1e-6 by
default), segment_anything uses 1e-5, as in SAM's training.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")
_SHARED = "shared_image_embedding.positional_embedding"
_TIED = "prompt_encoder.shared_embedding.positional_embedding"
_MATRIX = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_MLPS = (
    "mask_decoder.output_hypernetworks_mlps.{0}",
    "mask_decoder.iou_prediction_head",
)

# The start of a name in Hugging Face's and in segment_anything's spelling; the rest is the same.
# The first rule that fits a direction counts; {0} and {1} are numbers.
_PAIRS = [
    (_SHARED, _MATRIX),
    (_TIED, _MATRIX),
    ("prompt_encoder.point_embed", "prompt_encoder.point_embeddings"),
    ("prompt_encoder.mask_embed.conv1", "prompt_encoder.mask_downscaling.0"),
    ("prompt_encoder.mask_embed.layer_norm1", "prompt_encoder.mask_downscaling.1"),
    ("prompt_encoder.mask_embed.conv2", "prompt_encoder.mask_downscaling.3"),
    ("prompt_encoder.mask_embed.layer_norm2", "prompt_encoder.mask_downscaling.4"),
    ("prompt_encoder.mask_embed.conv3", "prompt_encoder.mask_downscaling.6"),
    ("vision_encoder.patch_embed.projection", "image_encoder.patch_embed.proj"),
    ("vision_encoder.layers.{0}.layer_norm{1}", "image_encoder.blocks.{0}.norm{1}"),
    ("vision_encoder.layers", "image_encoder.blocks"),
    ("vision_encoder.neck.conv1", "image_encoder.neck.0"),
    ("vision_encoder.neck.layer_norm1", "image_encoder.neck.1"),
    ("vision_encoder.neck.conv2", "image_encoder.neck.2"),
    ("vision_encoder.neck.layer_norm2", "image_encoder.neck.3"),
    ("vision_encoder", "image_encoder"),
    (
        "mask_decoder.transformer.layers.{0}.layer_norm{1}",
        "mask_decoder.transformer.layers.{0}.norm{1}",
    ),
    ("mask_decoder.transformer.layer_norm_final_attn", "mask_decoder.transformer.norm_final_attn"),
    ("mask_decoder.upscale_conv1", "mask_decoder.output_upscaling.0"),
    ("mask_decoder.upscale_layer_norm", "mask_decoder.output_upscaling.1"),
    ("mask_decoder.upscale_conv2", "mask_decoder.output_upscaling.3"),
    *(
        (f"{mlp}.{theirs}", f"{mlp}.{ours}")
        for mlp in _MLPS
        for theirs, ours in (("proj_in", "layers.0"), ("layers.0", "layers.1"))
    ),
    *((f"{mlp}.proj_out", f"{mlp}.layers.2") for mlp in _MLPS),
]


def _rule(before: str, after: str) -> tuple[re.Pattern[str], str]:
    """Compile a rule: the start of a name and its replacement, with numbers in the same order."""
    pattern = re.sub(r"\\{\d\\}", r"(\\d+)", re.escape(before))
    return re.compile(pattern + r"(?=\.|$)"), re.sub(
        r"\{(\d)\}", lambda found: f"\\g<{int(found[1]) + 1}>", after
    )


_RULES = [_rule(theirs, ours) for theirs, ours in _PAIRS]
_RULES_BACK = [_rule(ours, theirs) for theirs, ours in _PAIRS]


def is_hugging_face(names: Iterable[str]) -> bool:
    """True if the tensors have the names of a Hugging Face model."""
    return any(name.startswith("vision_encoder.") for name in names)


def to_segment_anything(state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename tensors to segment_anything's names; keep names without a rule."""
    return {other: state[name] for name, other in spellings(state).items()}


def to_hugging_face(state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename tensors back; the position matrix gets both its names. Keep other names."""
    named = {_replaced(name, _RULES_BACK): value for name, value in state.items()}
    return named | ({_TIED: named[_SHARED]} if _SHARED in named else {})


def spellings(names: Collection[str]) -> dict[str, str]:
    """Map Hugging Face's names to segment_anything's; list a tensor with two names once."""
    return {name: spelled(name) for name in names if name != _TIED or _SHARED not in names}


def spelled(name: str) -> str:
    """Translate a tensor's or module's name to segment_anything's spelling."""
    return _replaced(name, _RULES)


def _replaced(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name


def spelled_back(name: str, known: Mapping[str, str]) -> str:
    """Translate a tensor's or module's segment_anything name to Hugging Face's spelling.

    known: maps segment_anything's names of a model's modules and tensors to Hugging Face's. A name
        that is not listed is looked up by the nearest module around it.
    """
    head, tail = name, ""
    while head:
        if head in known:
            return known[head] + tail
        head, _, leaf = head.rpartition(".")
        tail = f".{leaf}{tail}"
    return name
