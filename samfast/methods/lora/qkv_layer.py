# SPDX-License-Identifier: Apache-2.0
"""LoRA on chosen slices of a packed query-key-value layer."""

import math

import torch
from torch import nn

from samfast.adapters.checks import QKV, check_dropout, check_rank, checked_slices
from samfast.adapters.low_rank import LowRankLinear
from samfast.functional import lora_linear
from samfast.kernels.sam_block.plan import LayerPlan


class QkvLora(LowRankLinear):
    """Packed qkv layer with a separate LoRA on its query, key or value outputs.

    x: (..., in_features) -> (..., out_features) = x Wᵀ + b. To every chosen slice i of length
    L = out_features / 3 it adds drop(x) A_iᵀ B_iᵀ, unscaled, as in SAMed and SAM-COBOT's baseline.

    lora_A: (n·rank, in_features), the n slices' A below each other, each Kaiming uniform
    lora_B: (n·L, rank), the slices' B below each other, zeros
    """

    token_wise = block_watched = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        slices: tuple[str, ...] = ("q", "v"),
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ):
        self.check_sizes(in_features, out_features, rank)
        slices = checked_slices(slices)
        check_dropout(dropout)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.rank = rank
        self.slices = slices
        self.dropout = dropout
        n, length = len(slices), out_features // 3
        self.ranges = tuple((QKV.index(s) * length, (QKV.index(s) + 1) * length) for s in slices)
        self.add_adapter(lora_A=(n * rank, in_features), lora_B=(n * length, rank))
        self.reset_adapter()

    @staticmethod
    def check_sizes(in_features: int, out_features: int, rank: int) -> None:
        """Raise ValueError if layers of these sizes cannot have this update."""
        check_rank(rank)
        if out_features % 3:
            raise ValueError(
                f"a packed qkv layer has three equal parts, but {out_features} outputs do not "
                "divide by 3"
            )
        if rank > min(in_features, out_features // 3):
            raise ValueError(
                f"rank {rank} is above {min(in_features, out_features // 3)}, the smaller side of "
                f"a qkv slice with {in_features} inputs and {out_features // 3} outputs"
            )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        slices: tuple[str, ...] = ("q", "v"),
        dropout: float = 0.0,
    ) -> "QkvLora":
        """Add sliced LoRA to a packed qkv layer; keep its weight and bias Parameters."""
        return cls._from_linear(linear, rank=rank, slices=slices, dropout=dropout)

    def reset_adapter(self) -> None:
        """Initialise the A factors anew and set the B factors to zeros."""
        # The bound depends only on the number of inputs, so one call fills every slice's A.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> torch.Tensor:
        a, b = self.factors()
        wide = torch.promote_types(a.dtype, torch.float32)
        n, length = len(self.slices), self.out_features // 3
        a = a.to(wide).view(n, self.rank, self.in_features)
        b = b.to(wide).view(n, length, self.rank)
        delta = a.new_zeros(self.out_features, self.in_features)
        for (start, stop), part in zip(self.ranges, b @ a, strict=True):
            delta[start:stop] = part
        return delta

    def forward_adapted(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer with its update. x: (..., in_features) -> (..., out_features)"""
        dropout = self.dropout if self.training else 0.0
        return lora_linear(
            x,
            self.weight,
            self.bias,
            *self.factors(),
            1.0,
            dropout=dropout,
            slices=self.ranges,
        )

    def layer_plan(self, dropout: float) -> LayerPlan:
        starts = tuple(start for start, _ in self.ranges)
        own = len(starts) > 1
        return LayerPlan(adapted=True, dropout=float(dropout), starts=starts, own=own)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, rank={self.rank}, slices={','.join(self.slices)}"
        text += f", dropout={self.dropout}" if self.dropout else ""
        return text + (", merged" if self.merged else "")
