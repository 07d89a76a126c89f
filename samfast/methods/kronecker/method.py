# SPDX-License-Identifier: Apache-2.0
"""Kronecker products on linear layers and their options."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from samfast.adapters.checks import check_alpha, check_dropout, check_rank, checked_target
from samfast.adapters.method import Method
from samfast.adapters.options import alpha_option, dropout_option, option, target_option
from samfast.methods.kronecker.checks import check_n

if TYPE_CHECKING:
    from torch import nn

    from samfast.adapters.adapter import Adapter
    from samfast.adapters.foreign import Foreign


@dataclasses.dataclass(frozen=True)
class Kronecker(Method):
    """Sums of Kronecker products of low rank on linear layers (PHM, Compacter), from zero on.

    n: number of products and side of their rules; it must divide the layers' sizes
    rank: rank of each product's large factor; the update has rank n · n · rank
    alpha: the update is scaled by alpha / rank; None means alpha = rank
    dropout: on the adapter's input, in training
    target: as in ``Lora``
    """

    name: ClassVar[str] = "kronecker"

    n: int = option(4, "Number of products; must divide the layers' sizes", name="kron_n", least=1)
    rank: int = option(
        1, "Rank of each product's large factor; the update has rank kron_n * kron_n * rank"
    )
    alpha: float | None = alpha_option(None)
    dropout: float = dropout_option(0.0)
    target: str | tuple[str, ...] = target_option(("qkv", "proj"))

    def __post_init__(self) -> None:
        check_n(self.n)
        check_rank(self.rank)
        check_alpha(self.alpha)
        check_dropout(self.dropout)
        object.__setattr__(self, "target", checked_target(self.target))

    def check_options(self, find_layers: "Callable[[Method], Mapping[str, Foreign]]") -> None:
        for name, layer in find_layers(dataclasses.replace(self, n=1)).items():
            for size, what in ((layer.in_features, "inputs"), (layer.out_features, "outputs")):
                if size % self.n:
                    raise ValueError(
                        f"kron_n is {self.n}, which does not divide the {size} {what} of {name}"
                    )

    @property
    def smallest_width(self) -> int:
        return max(16, self.rank) * self.n

    def same_update(self, other: Method) -> bool:
        if type(other) is not Kronecker:
            return False
        mine, theirs = ((m.n, m.rank, (m.alpha or m.rank) / m.rank) for m in (self, other))
        return mine == theirs

    def check(self, layer: "nn.Linear") -> None:
        from samfast.methods.kronecker.layer import KroneckerLinear

        KroneckerLinear.check_sizes(layer.in_features, layer.out_features, self.n, self.rank)

    def wrap(self, layer: "nn.Linear") -> "Adapter":
        from samfast.methods.kronecker.layer import KroneckerLinear

        return KroneckerLinear.from_linear(layer, self.n, self.rank, self.alpha, self.dropout)
