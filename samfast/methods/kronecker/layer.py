# SPDX-License-Identifier: Apache-2.0
"""A sum of low-rank Kronecker products as the update of a linear layer; it runs as LoRA."""

import torch
from torch import Tensor, nn

from samfast.adapters.checks import check_alpha, check_dropout, check_rank
from samfast.adapters.low_rank import LowRankLinear
from samfast.backends import requested
from samfast.functional import kronecker_factors, kronecker_weight, lora_linear
from samfast.kernels.hypercomplex.factors import factors_backend
from samfast.kernels.sam_block.plan import LayerPlan
from samfast.methods.kronecker.checks import check_divides


class KroneckerLinear(LowRankLinear):
    """Linear layer with a low-rank PHM update (Compacter, Mahabadi et al. 2021, on the weight).

    x: (..., in_features) -> (..., out_features) = x Wᵀ + b + alpha/rank · drop(x) ΔWᵀ,
    ΔW = Σ_i kron_rules_i ⊗ (kron_left_i kron_right_iᵀ)

    kron_rules: (n, n, n), uniform of variance 1/n   kron_left: (n, out_features/n, rank), zeros
    kron_right: (n, in_features/n, rank), Kaiming uniform

    The update is LoRA of rank n · n · rank, with factors computed from these. It does all that LoRA
    does, on the same backends. All three are float32, or float64 with a float64 weight. ``alpha``
    None means alpha = rank. Dropout acts only in training, on the adapter's input.
    """

    token_wise = True
    kron_rules: nn.Parameter
    kron_left: nn.Parameter
    kron_right: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int = 4,
        rank: int = 1,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ):
        self.check_sizes(in_features, out_features, n, rank)
        check_alpha(alpha)
        check_dropout(dropout)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.n = n
        self.rank = rank
        self.alpha = rank if alpha is None else alpha
        self.dropout = dropout
        self.add_adapter(
            kron_rules=(n, n, n),
            kron_left=(n, out_features // n, rank),
            kron_right=(n, in_features // n, rank),
        )
        self.reset_adapter()

    @staticmethod
    def check_sizes(in_features: int, out_features: int, n: int, rank: int) -> None:
        """Raise ValueError if layers of these sizes cannot have this update."""
        check_divides(n, in_features, out_features)
        check_rank(rank)
        if rank > min(in_features, out_features) // n:
            raise ValueError(
                f"rank {rank} is above {min(in_features, out_features) // n}, the smaller side of "
                f"the {n} x {n} parts of a linear layer with {in_features} inputs and "
                f"{out_features} outputs"
            )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        n: int = 4,
        rank: int = 1,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> "KroneckerLinear":
        """Add the update to ``linear``; keep its weight and bias Parameters."""
        return cls._from_linear(linear, n=n, rank=rank, alpha=alpha, dropout=dropout)

    @property
    def scaling(self) -> float:
        """The factor of the update."""
        return self.alpha / self.rank

    def reset_adapter(self) -> None:
        """Initialise the adapter's parameters anew."""
        reset_rules(self.kron_rules)
        # Initialised like the rows of LoRA's A; a part has in_features / n inputs.
        bound = self.kron_right.shape[1] ** -0.5
        nn.init.uniform_(self.kron_right, -bound, bound)
        nn.init.zeros_(self.kron_left)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "kron_left" in self._parameters:  # nn.Linear calls this before the adapter exists
            self.reset_adapter()

    def factors(self) -> tuple[Tensor, Tensor]:
        return kronecker_factors(self.kron_rules, self.kron_left, self.kron_right)

    def delta_weight(self) -> Tensor:
        wide = torch.promote_types(self.kron_rules.dtype, torch.float32)
        pair = self.kron_left.to(wide), self.kron_right.to(wide)
        return kronecker_weight(self.kron_rules.to(wide), pair, scaling=self.scaling)

    def forward_adapted(self, x: Tensor) -> Tensor:
        """Run the layer with its update. x: (..., in_features) -> (..., out_features)"""
        dropout = self.dropout if self.training else 0.0
        return lora_linear(
            x, self.weight, self.bias, *self.factors(), self.scaling, dropout=dropout
        )

    def layer_plan(self, dropout: float) -> LayerPlan:
        return LayerPlan(adapted=True, scaling=float(self.scaling), dropout=float(dropout))

    def backends(self) -> dict[str, str]:
        like = self.kron_left
        try:
            own = factors_backend(requested("auto"), like.device, like.dtype)
        except RuntimeError as error:
            return {"kronecker_factors": str(error)}
        return {**super().backends(), "kronecker_factors": own}

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, n={self.n}, rank={self.rank}, alpha={self.alpha}"
        text += f", dropout={self.dropout}" if self.dropout else ""
        return text + (", merged" if self.merged else "")


def reset_rules(rules: Tensor) -> None:
    """Fill with uniform values of variance 1/n, so that a sum of n terms keeps the variance."""
    bound = (3 / rules.shape[1]) ** 0.5
    nn.init.uniform_(rules, -bound, bound)
