# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT on LoRA and its options."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, cast

from samfast.adapters.checks import check_flag, checked_target
from samfast.adapters.method import Method, Relation
from samfast.adapters.options import option
from samfast.methods.cobot.checks import check_width

if TYPE_CHECKING:
    from torch import nn

    from samfast.adapters.adapter import Adapter
    from samfast.adapters.foreign import Foreign
    from samfast.methods.cobot.layer import CobotLayer


# One of the authors' scripts trains them at 100 times the rate of the rest.
COBOT = Relation("the relation, the coefficients and the heads")


@dataclasses.dataclass(frozen=True)
class CobotLora(Method):
    """SAM-COBOT (CVPR 2024) on LoRA of q and v: coefficients that all blocks share, and heads.

    rank: rank of the unscaled updates; a multiple of 4
    zero_start: initialise the update to zero (B zeros); the published method does not
    target: as in ``Lora``, of packed qkv layers
    """

    name: ClassVar[str] = "cobot-lora"
    lacks = MappingProxyType({"target": "adapts q and v of every block"})

    rank: int = option(4, "Rank of the update; must be a multiple of 4")
    zero_start: bool = option(
        False, "Initialise the update to zero (the published method does not)"
    )
    target: str | tuple[str, ...] = "qkv"

    def __post_init__(self) -> None:
        check_width("rank", self.rank)
        check_flag("zero_start", self.zero_start)
        object.__setattr__(self, "target", checked_target(self.target))

    @property
    def relation(self) -> Relation:
        return COBOT

    def same_update(self, other: Method) -> bool:
        return type(other) is CobotLora and self.rank == other.rank

    def check(self, layer: "nn.Linear") -> None:
        from samfast.methods.cobot.layer import CobotQkvLora

        if layer.out_features != 3 * layer.in_features:
            raise ValueError(
                f"a packed qkv layer has three outputs for each input, but this one has "
                f"{layer.out_features} for {layer.in_features}"
            )
        CobotQkvLora.check_sizes(layer.in_features, layer.out_features, self.rank)

    def build(self, layers: "Mapping[str, Foreign]") -> "Mapping[str, Adapter]":
        """Build all layers in the model's order, which numbers the slices: q and v of each."""
        from samfast.methods.cobot.layer import CobotQkvLora, relation

        weight = next(iter(layers.values())).weight
        shared = relation(self.rank, 2 * len(layers), weight)
        return {
            name: CobotQkvLora.from_linear(layer, self.rank, shared, index, self.zero_start)
            for index, (name, layer) in enumerate(layers.items())
        }

    def attached(self, model: "nn.Module", adapted: "Mapping[str, Adapter]") -> None:
        from samfast.adapters.wrappers import encoder_of
        from samfast.methods.cobot.layer import CobotForward

        CobotForward(cast("list[CobotLayer]", list(adapted.values()))).install(encoder_of(model))
