# SPDX-License-Identifier: Apache-2.0
"""Find out whose transformer blocks these are: segment_anything's, a copy's, another library's.

A class is found by its name and its module. ``samfast.fused.proof`` checks that it computes what
its name says.
"""

import importlib
import sys
from typing import Any

from torch import nn

from samfast.adapters.foreign import cache
from samfast.fused.parts import Family
from samfast.integrations import segment_anything

SEGMENT_ANYTHING = "segment_anything"
_MODULE = "segment_anything.modeling.image_encoder"
_COPIED = ("Attention", "Block", "MLPBlock")
# Classes of blocks and attentions, with the file that knows them.
LIBRARIES = {
    "transformers.models.sam.modeling_sam.SamVisionAttention": "transformers_sam",
    "transformers.models.sam.modeling_sam.SamVisionLayer": "transformers_sam",
    "transformers.models.sam_hq.modeling_sam_hq.SamHQVisionAttention": "transformers_sam",
    "transformers.models.sam_hq.modeling_sam_hq.SamHQVisionLayer": "transformers_sam",
    "transformers.models.sam3.modeling_sam3.Sam3ViTLayer": "transformers_sam3",
    "transformers.models.sam3.modeling_sam3.Sam3ViTRoPEAttention": "transformers_sam3",
    "sam3.model.vitdet.Attention": "sam3",
    "sam3.model.vitdet.Block": "sam3",
    "timm.models.vision_transformer_sam.Attention": "timm_sam",
    "timm.models.vision_transformer_sam.Block": "timm_sam",
}


def load() -> Family:
    """Import segment_anything and return its classes."""
    encoder = segment_anything.load().modeling.image_encoder
    return Family(SEGMENT_ANYTHING, *(getattr(encoder, name) for name in _COPIED))


def loaded() -> Family | None:
    """Return segment_anything's classes; None while no model can have them."""
    encoder = sys.modules.get(_MODULE)
    if not all(hasattr(encoder, name) for name in _COPIED):
        return None  # not imported, or a copy without them
    return Family(SEGMENT_ANYTHING, *(getattr(encoder, name) for name in _COPIED))


@cache
def family_of(kind: type[nn.Module]) -> Family | None:
    """Return the family that a block's or attention's class belongs to or derives from."""
    for base in kind.__mro__:
        file = LIBRARIES.get(f"{base.__module__}.{base.__qualname__}")
        if file is not None:
            return importlib.import_module(f"samfast.integrations.{file}").family(base)
        stock = loaded()
        if stock is not None and base in (stock.block, stock.attention):
            return stock
        if base.__qualname__ in _COPIED and (copy := _copy(base)) is not None:
            return copy
    return None


def _copy(kind: type[nn.Module]) -> Family | None:
    """Return the classes in the module of a class that has a segment_anything name."""
    beside: dict[str, Any] = getattr(kind.__init__, "__globals__", {})
    found: list[Any] = [beside.get(name) for name in _COPIED]
    if kind not in found[:2] or not all(_is_module(other) for other in found):
        return None
    attention, block, mlp = found
    return Family(kind.__module__.partition(".")[0], attention, block, mlp)


def _is_module(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def is_block(module: nn.Module) -> bool:
    """True for a library's block, its fused class, or a class derived from one."""
    family = family_of(type(module))
    return family is not None and isinstance(module, family.block)


def is_attention(module: nn.Module) -> bool:
    """True for a library's attention, its fused class, or a class derived from one."""
    family = family_of(type(module))
    return family is not None and isinstance(module, family.attention)
