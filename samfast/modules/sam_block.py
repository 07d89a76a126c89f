# SPDX-License-Identifier: Apache-2.0
"""segment_anything's transformer block around the fused attention."""

from torch import Tensor

from samfast.integrations import segment_anything
from samfast.kernels._common.windows import Windows
from samfast.modules.rel_pos_attention import Attention, RelPosAttention
from samfast.modules.stand_in import altered, kind_of, standing_in

Block = segment_anything.load().modeling.image_encoder.Block


class SamBlock(Block):
    """Transformer block with window attention, as the stock module, without copies of windows.

    x: (B, H, W, D) -> (B, H, W, D). Parameters, submodules and the state dict are the stock
    module's.
    """

    @classmethod
    def from_block(cls, block: Block) -> "SamBlock":
        """A block with the Parameters, submodules and hooks of ``block``."""
        if type(block) is not Block:
            raise TypeError(f"expected segment_anything's Block, got {type(block).__name__}")
        module = standing_in(cls, block)
        if type(block.attn) is Attention:
            module.attn = RelPosAttention.from_attention(block.attn)
        return module

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attention(self, x: Tensor) -> Tensor:
        if self.window_size == 0:
            return self.attn(x)
        if self.window_order() is None:
            return self.attn(x, self.window_size)
        windows = Windows(*x.shape[:3], self.window_size, self.window_size)
        tokens, _ = windows.paste(self.attn(windows.cut(x)))
        return tokens.view(x.shape)

    def window_order(self) -> str | None:
        """None when windows run in image order, or why they are cut before the attention."""
        if type(self.attn) is not RelPosAttention:
            return f"attn is {kind_of(self.attn)}"
        if altered(self.attn):
            return "attn has hooks or a forward of its own"
        return self.attn.window_order()
