# SPDX-License-Identifier: Apache-2.0
"""LoRA and its options."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from samfast.adapters.checks import (
    QKV,
    check_alpha,
    check_dropout,
    check_rank,
    checked_slices,
    checked_target,
)
from samfast.adapters.method import Method
from samfast.adapters.options import alpha_option, dropout_option, option, target_option

if TYPE_CHECKING:
    from torch import nn

    from samfast.adapters.adapter import Adapter
    from samfast.methods.lora.layer import LoraLinear
    from samfast.methods.lora.qkv_layer import QkvLora


@dataclasses.dataclass(frozen=True)
class Lora(Method):
    """LoRA (Hu et al. 2021) on linear layers.

    rank: rank of the update
    alpha: the update is scaled by alpha / rank; None means alpha = rank
    dropout: on the adapter's input, in training
    target: a layer's leaf name ("qkv", "proj", "lin1", "lin2"), a regular expression over full
        names, or a tuple of those
    slices: parts ("q", "k", "v") of a packed qkv layer that each get their own unscaled update,
        instead of one update on the whole layer
    """

    name: ClassVar[str] = "lora"

    rank: int = option(4, "Rank of the update")
    alpha: float | None = alpha_option(None)
    dropout: float = dropout_option(0.0)
    target: str | tuple[str, ...] = target_option("qkv")
    slices: tuple[str, ...] | None = option(
        None,
        "Adapt only these parts of qkv, each with its own factors and without scaling",
        type=tuple[str, ...],
        choices=QKV,
        hint="default: all of qkv together",
    )

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_alpha(self.alpha)
        check_dropout(self.dropout)
        object.__setattr__(self, "target", checked_target(self.target))
        if self.slices is None:
            return
        object.__setattr__(self, "slices", checked_slices(self.slices))
        if self.target != "qkv":
            raise ValueError(f"slices are parts of qkv layers, but target is {self.target!r}")
        if self.alpha is not None:
            raise ValueError(f"sliced LoRA is unscaled, so alpha must be None, not {self.alpha!r}")

    def same_update(self, other: Method) -> bool:
        if type(other) is not Lora:
            return False
        scale, theirs = ((m.alpha or m.rank) / m.rank for m in (self, other))
        return (self.rank, self.slices, scale) == (other.rank, other.slices, theirs)

    def check(self, layer: "nn.Linear") -> None:
        self._kind().check_sizes(layer.in_features, layer.out_features, self.rank)

    def wrap(self, layer: "nn.Linear") -> "Adapter":
        if self.slices is None:
            from samfast.methods.lora.layer import LoraLinear

            return LoraLinear.from_linear(layer, self.rank, self.alpha, self.dropout)
        from samfast.methods.lora.qkv_layer import QkvLora

        return QkvLora.from_linear(layer, self.rank, self.slices, self.dropout)

    def _kind(self) -> "type[LoraLinear | QkvLora]":
        if self.slices is None:
            from samfast.methods.lora.layer import LoraLinear

            return LoraLinear
        from samfast.methods.lora.qkv_layer import QkvLora

        return QkvLora
