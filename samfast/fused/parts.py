# SPDX-License-Identifier: Apache-2.0
"""What segment_anything calls its transformer block and what is in it.

The other files of this folder ask here for a class, for a name, or for what has the name.
"""

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from samfast.integrations import segment_anything

IN_BLOCK = NORM1, ATTENTION, NORM2, MLP = ("norm1", "attn", "norm2", "mlp")
IN_ATTENTION = QKV, PROJ = ("qkv", "proj")
IN_MLP = LIN1, LIN2, ACTIVATION = ("lin1", "lin2", "act")
TABLES = ("rel_pos_h", "rel_pos_w")  # parameters of an attention with relative positions
WINDOW = "window_size"  # of a block, 0 for the whole map
OPTIONS = HEADS, SCALE, HAS_TABLES = ("num_heads", "scale", "use_rel_pos")  # of an attention
_MODULE = "segment_anything.modeling.image_encoder"


class Stock(NamedTuple):
    """segment_anything's classes."""

    attention: type[nn.Module]
    block: type[nn.Module]
    mlp: type[nn.Module]


def load() -> Stock:
    """The classes of the installed segment_anything, which is imported now."""
    return _classes(segment_anything.load().modeling.image_encoder)


def loaded() -> Stock | None:
    """The classes; None while no model can have them."""
    encoder = sys.modules.get(_MODULE)
    if not all(hasattr(encoder, name) for name in ("Attention", "Block", "MLPBlock")):
        return None  # not imported, or a copy without them
    return _classes(encoder)


def _classes(encoder: Any) -> Stock:
    return Stock(encoder.Attention, encoder.Block, encoder.MLPBlock)


def child(module: nn.Module, name: str) -> nn.Module | None:
    """The part of that name, None where there is none."""
    return module._modules.get(name)


def norms(block: nn.Module) -> dict[str, nn.Module]:
    return {NORM1: block.norm1, NORM2: block.norm2}


def attention(block: nn.Module) -> nn.Module:
    return block.attn


def mlp(block: nn.Module) -> nn.Module:
    return block.mlp


def activation(block: nn.Module) -> nn.Module:
    return block.mlp.act


def window(block: nn.Module) -> int:
    return block.window_size


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The four linear layers in the order in which they run."""
    mlp = block.mlp
    return {**projections(block.attn), LIN1: mlp.lin1, LIN2: mlp.lin2}


def projections(attention: nn.Module) -> dict[str, nn.Module]:
    """The layers before and after the attention."""
    return {QKV: attention.qkv, PROJ: attention.proj}


def has_tables(attention: nn.Module) -> bool:
    return attention.use_rel_pos


def tables(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """Relative positions along the height and along the width."""
    return attention.rel_pos_h, attention.rel_pos_w


def heads(attention: nn.Module) -> int:
    return attention.num_heads


def scale(attention: nn.Module) -> float:
    return attention.scale
