# SPDX-License-Identifier: Apache-2.0
"""LoRA on a whole linear layer."""

import math

import torch
from torch import nn

from samfast.adapters.checks import check_alpha, check_dropout, check_linear_rank
from samfast.adapters.low_rank import LowRankLinear
from samfast.functional import lora_linear
from samfast.kernels.sam_block.plan import LayerPlan


class LoraLinear(LowRankLinear):
    """Linear layer with a low-rank update (LoRA, Hu et al. 2021).

    x: (..., in_features) -> (..., out_features) = x Wᵀ + b + alpha/rank · drop(x) Aᵀ Bᵀ
    lora_A: (rank, in_features), Kaiming uniform   lora_B: (out_features, rank), zeros

    Both are float32 whatever the weight's dtype, or float64 with a float64 weight. ``alpha`` None
    means alpha = rank. Dropout acts only in training, on the adapter's input.
    """

    token_wise = block_watched = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ):
        self.check_sizes(in_features, out_features, rank)
        check_alpha(alpha)
        check_dropout(dropout)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.rank = rank
        self.alpha = rank if alpha is None else alpha
        self.dropout = dropout
        self.add_adapter(lora_A=(rank, in_features), lora_B=(out_features, rank))
        self.reset_adapter()

    check_sizes = staticmethod(check_linear_rank)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, alpha: float | None = None, dropout: float = 0.0
    ) -> "LoraLinear":
        """Add LoRA to ``linear``; keep its weight and bias Parameters."""
        return cls._from_linear(linear, rank=rank, alpha=alpha, dropout=dropout)

    @property
    def scaling(self) -> float:
        """The factor of the update: alpha / rank."""
        return self.alpha / self.rank

    def reset_adapter(self) -> None:
        """Initialise lora_A anew and set lora_B to zeros."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> torch.Tensor:
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))

    def forward_adapted(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer with its update. x: (..., in_features) -> (..., out_features)"""
        dropout = self.dropout if self.training else 0.0
        return lora_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, dropout=dropout
        )

    def layer_plan(self, dropout: float) -> LayerPlan:
        return LayerPlan(adapted=True, scaling=float(self.scaling), dropout=float(dropout))

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"
        text += f", dropout={self.dropout}" if self.dropout else ""
        return text + (", merged" if self.merged else "")
