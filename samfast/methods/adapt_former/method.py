# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer and its options."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, cast

from samfast.adapters.checks import check_bottleneck, check_dropout, check_flag, checked_target
from samfast.adapters.method import Method, Relation
from samfast.adapters.options import option, target_option
from samfast.methods.cobot.checks import check_width
from samfast.methods.cobot.method import COBOT

if TYPE_CHECKING:
    from torch import nn

    from samfast.adapters.adapter import Adapter
    from samfast.adapters.foreign import Foreign
    from samfast.methods.cobot.layer import CobotLayer


@dataclasses.dataclass(frozen=True)
class AdaptFormer(Method):
    """AdaptFormer (NeurIPS 2022): branches next to the MLPs of segment_anything's blocks.

    bottleneck: width of the branch
    dropout: on the bottleneck, in training
    cobot: relate the branches' coefficients across blocks, as in SAM-COBOT (CVPR 2024)
    target: as in ``Lora``, of MLPs
    """

    name: ClassVar[str] = "adaptformer"

    bottleneck: int = option(16, "Width of the branches; with SAM-COBOT, a multiple of 4")
    dropout: float = option(0.1, "Dropout on the bottleneck during training")
    cobot: bool = False
    target: str | tuple[str, ...] = target_option(
        "mlp", "Encoder MLPs to adapt: mlp, or a regular expression"
    )

    def __post_init__(self) -> None:
        check_bottleneck(self.bottleneck)
        check_dropout(self.dropout)
        check_flag("cobot", self.cobot)
        if self.cobot:
            check_width("bottleneck", self.bottleneck)
        object.__setattr__(self, "target", checked_target(self.target))

    @property
    def replaces(self) -> "type[nn.Module]":  # type: ignore[override]  # read only in both
        """segment_anything's MLPBlock, imported on first access."""
        from samfast.methods.adapt_former.layer import MLPBlock

        return MLPBlock

    @classmethod
    def variants(cls) -> dict[str, Method]:
        return {cls.name: cls(), "cobot-adaptformer": cls(cobot=True)}

    def summary(self) -> str:
        return f"{super().summary()}{', with SAM-COBOT' if self.cobot else ''}"

    @property
    def relation(self) -> Relation | None:
        return COBOT if self.cobot else None

    def smallest_layer(self) -> "tuple[nn.Module, int]":
        width = max(16, self.bottleneck)
        return self.replaces(width, width), width

    def same_update(self, other: Method) -> bool:
        if type(other) is not AdaptFormer:
            return False
        return (self.bottleneck, self.cobot) == (other.bottleneck, other.cobot)

    def check(self, layer: "Foreign") -> None:
        from samfast.methods.adapt_former.layer import AdaptFormerMlp

        AdaptFormerMlp.check_mlp(layer)

    def build(self, layers: "Mapping[str, Foreign]") -> "Mapping[str, Adapter]":
        """Build all layers in the model's order, which numbers those that share tensors."""
        options = self.bottleneck, self.dropout
        if not self.cobot:
            from samfast.methods.adapt_former.layer import AdaptFormerMlp

            return {name: AdaptFormerMlp.from_mlp(m, *options) for name, m in layers.items()}
        from samfast.methods.adapt_former.cobot_layer import CobotAdaptFormerMlp
        from samfast.methods.cobot.layer import relation

        weight = next(iter(layers.values())).lin1.weight
        shared = relation(self.bottleneck, len(layers), weight)
        return {
            name: CobotAdaptFormerMlp.from_mlp(layer, *options, shared, index)
            for index, (name, layer) in enumerate(layers.items())
        }

    def attached(self, model: "nn.Module", adapted: "Mapping[str, Adapter]") -> None:
        if self.cobot:
            from samfast.adapters.wrappers import encoder_of
            from samfast.methods.cobot.layer import CobotForward

            CobotForward(cast("list[CobotLayer]", list(adapted.values()))).install(
                encoder_of(model)
            )
