# SPDX-License-Identifier: Apache-2.0
"""Conv-LoRA and its options."""

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from samfast.adapters.checks import check_alpha, check_dropout, check_rank, checked_target
from samfast.adapters.method import Method
from samfast.adapters.options import alpha_option, dropout_option, option, target_option
from samfast.methods.conv_lora.checks import check_choice, check_depthwise, check_experts

if TYPE_CHECKING:
    from torch import nn

    from samfast.adapters.adapter import Adapter


@dataclasses.dataclass(frozen=True)
class ConvLora(Method):
    """Conv-LoRA (ICLR 2024) on linear layers that see maps of tokens.

    rank, alpha: the update is scaled by alpha / rank; alpha None means alpha = rank
    experts: number of convolutions, the i-th on the map enlarged i times
    depthwise: give each channel of the bottleneck its own convolution
    dropout: on the adapter's input, in training
    target: as in ``Lora``
    top_k: experts per map   formula: "code" as the authors run it, or "paper" as they write it.
        Other choices than 1 and "code" are slow.
    """

    name: ClassVar[str] = "conv-lora"
    recipe = MappingProxyType({"schedule": "polynomial", "loss": "structure"})  # the authors'
    checkpoint_lr = 1e-4
    binary_head = True
    lacks = MappingProxyType({"slices": "adapts whole layers"})

    rank: int = option(3, "Rank of the update")
    alpha: float | None = alpha_option(32)
    experts: int = option(8, "Number of convolutions that the gate chooses from")
    depthwise: bool = option(False, "Give each channel its own convolution", in_folder=True)
    dropout: float = dropout_option(0.0)
    target: str | tuple[str, ...] = target_option("qkv")
    top_k: int = 1
    formula: str = "code"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_alpha(self.alpha)
        check_experts(self.experts)
        check_depthwise(self.depthwise)
        check_dropout(self.dropout)
        check_choice(self.top_k, self.experts, self.formula)
        object.__setattr__(self, "target", checked_target(self.target))

    def same_update(self, other: Method) -> bool:
        if type(other) is not ConvLora:
            return False
        mine, theirs = (
            (m.rank, (m.alpha or m.rank) / m.rank, m.experts, m.depthwise, m.top_k, m.formula)
            for m in (self, other)
        )
        return mine == theirs

    def check(self, layer: "nn.Linear") -> None:
        from samfast.methods.conv_lora.layer import ConvLoraLinear

        ConvLoraLinear.check_sizes(layer.in_features, layer.out_features, self.rank)

    def wrap(self, layer: "nn.Linear") -> "Adapter":
        from samfast.methods.conv_lora.layer import ConvLoraLinear

        return ConvLoraLinear.from_linear(
            layer,
            self.rank,
            self.alpha,
            self.experts,
            depthwise=self.depthwise,
            dropout=self.dropout,
            top_k=self.top_k,
            formula=self.formula,
        )
