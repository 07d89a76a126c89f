# SPDX-License-Identifier: Apache-2.0
"""Find the fused class of a stock class, and the stock class of a fused one."""

from torch import nn

from samfast.adapters.stand_in import runs_as
from samfast.fused.attention import FusedAttention
from samfast.fused.block import BlockInParts, WholeBlock
from samfast.fused.families import family_of, loaded
from samfast.integrations.swap import derived, made_of, swapped


def fused_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the class that fuses exactly this stock class; None if there is none."""
    family = family_of(kind)
    if family is None or kind not in (family.attention, family.block):
        return None
    if family == loaded():
        from samfast.fused.rel_pos_attention import RelPosAttention
        from samfast.fused.sam_block import SamBlock

        return SamBlock if kind is family.block else RelPosAttention
    if family.published:
        return derived(kind, WholeBlock) if kind is family.block else None
    return derived(kind, BlockInParts if kind is family.block else FusedAttention)


def stock_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the stock class of a fused class; None for any other class."""
    if "_samfast_swapped" in vars(kind):
        return made_of(kind).stock
    stock = loaded()
    if stock is None or not issubclass(kind, (BlockInParts, FusedAttention)):
        return None
    pair = stock.attention, stock.block
    return next((found for found in pair if kind is fused_class(found)), None)


def is_fused_block(module: nn.Module) -> bool:
    """True for a fused block, also if a wrapper such as FSDP2 changed its class."""
    return runs_as(module, BlockInParts) or runs_as(module, WholeBlock)


def is_fused_attention(module: nn.Module) -> bool:
    """True for a fused attention, also if a wrapper changed its class."""
    return runs_as(module, FusedAttention)


def is_fused(module: nn.Module) -> bool:
    """True for a module that ``fuse`` changed, also if a wrapper changed its class since."""
    if swapped(module) is not None:
        return True
    return is_fused_block(module) or is_fused_attention(module)
