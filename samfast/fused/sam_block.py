# SPDX-License-Identifier: Apache-2.0
"""segment_anything's transformer block as one operator."""

from typing import TYPE_CHECKING

from torch import nn

from samfast.adapters.stand_in import standing_in
from samfast.fused.block import BlockInParts, check_memory
from samfast.fused.families import load
from samfast.fused.rel_pos_attention import RelPosAttention
from samfast.kernels.sam_block.plan import Memory

_family = load()
if TYPE_CHECKING:
    from samfast.fused.rel_pos_attention import Attention

    class Block(nn.Module):
        """segment_anything's."""

    MLPBlock: type[nn.Module]
else:
    Attention, Block, MLPBlock = _family.attention, _family.block, _family.mlp


class SamBlock(BlockInParts, Block):
    """Transformer block with window attention in one autograd node, as the stock module.

    x: (B, H, W, D) -> (B, H, W, D). Parameters, submodules and the state dict are the stock
    module's. ``block_problem`` says what prevents one node. The submodules then run one by one and
    save their own tensors; the attention is fused if possible. The node's result lies token by
    token, whatever the layout of x.

    memory: what the node saves for its backward, in elements per token. "fast": 10 · D, and only
        norms and GELU are recomputed; "balanced": 3 · D, qkv and lin1 are recomputed too;
        "minimal": D, the whole block is recomputed. Gradients are the same.
    """

    @classmethod
    def from_block(cls, block: Block, memory: Memory = "fast") -> "SamBlock":
        """Build a block with the Parameters, submodules and hooks of ``block``."""
        if type(block) is not Block:
            raise TypeError(f"expected segment_anything's Block, got {type(block).__name__}")
        check_memory(memory)
        module = standing_in(cls, block)
        module.memory = memory
        attention = _family.parts.attention(block)
        if type(attention) is Attention:
            name = _family.parts.IN_BLOCK[1]
            setattr(module, name, RelPosAttention.from_attention(attention))
        return module
