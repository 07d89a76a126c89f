# SPDX-License-Identifier: Apache-2.0
"""segment_anything's attention without its bias tensor and without copied windows."""

from typing import TYPE_CHECKING

from torch import nn

from samfast.adapters.stand_in import standing_in
from samfast.fused.attention import FusedAttention
from samfast.fused.families import load

if TYPE_CHECKING:

    class Attention(nn.Module):
        """segment_anything's."""
else:
    Attention = load().attention


class RelPosAttention(FusedAttention, Attention):
    """Fused multi-head attention with decomposed relative positions (ViTDet, SAM).

    x: (B, H, W, D) -> (B, H, W, D), as the stock module; with ``window``, as the stock module
    between window_partition and window_unpartition. Parameters, submodules and the state dict are
    the stock module's. See ``samfast.fused.attention``.

    backend: which kernel runs the attention, see ``samfast.backends``
    """

    @classmethod
    def from_attention(cls, attention: Attention) -> "RelPosAttention":
        """Build a fused module with the Parameters, submodules and hooks of ``attention``."""
        if type(attention) is not Attention:
            raise TypeError(
                f"expected segment_anything's Attention, got {type(attention).__name__}"
            )
        return standing_in(cls, attention)
