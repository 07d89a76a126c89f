# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer under SAM-COBOT's coefficients and heads."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from samfast.kernels.cobot_fold.reference import quaternion
from samfast.methods.adapt_former.layer import AdaptFormerMlp, MLPBlock
from samfast.methods.cobot.checks import check_width
from samfast.methods.cobot.layer import CobotLayer


class CobotAdaptFormerMlp(CobotLayer, AdaptFormerMlp):
    """MLP with a branch whose coefficients are related across blocks (SAM-COBOT, CVPR 2024).

    x: (..., D) -> (..., D) = mlp(x) + drop(ReLU(((c_l + γ) ⊙ (LN(x) downᵀ + b_down)) W)) upᵀ + b_up
    with c_l = (C P)[:, l] for layer l and the quaternion matrix W of a head

    It has the parameters of AdaptFormerMlp, gamma (bottleneck,) and heads (1, 4, bottleneck/4,
    bottleneck/4). All layers of a model share FacT_c (C) (1, bottleneck, layers) and FacT_p (P)
    (layers, layers). The state dict has FacT_d1.{r,i,j,k}_weight for the head.

    shared: FacT_c and FacT_p of a model; None gives this layer its own
    index: number of the layer among those that share
    Saves for backward what AdaptFormer saves. Raises ValueError if the bottleneck is not a multiple
    of 4, or if the index is outside the relation matrix.
    """

    FOLDED = ("down_proj.weight", "down_proj.bias")
    down = True

    def __init__(
        self,
        embedding_dim: int,
        mlp_dim: int,
        act: type[nn.Module] = nn.GELU,
        bottleneck: int = 16,
        dropout: float = 0.1,
        shared: Sequence[nn.Parameter] | None = None,
        index: int = 0,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ):
        check_width("bottleneck", bottleneck)
        _check_index(index)
        super().__init__(embedding_dim, mlp_dim, act, bottleneck, dropout, device, dtype)
        self.add_coefficients(bottleneck, 1, index, shared)
        self.reset_coefficients()

    @classmethod
    def from_mlp(
        cls,
        mlp: MLPBlock,
        bottleneck: int = 16,
        dropout: float = 0.1,
        shared: Sequence[nn.Parameter] | None = None,
        index: int = 0,
    ) -> "CobotAdaptFormerMlp":
        """Build the module from ``mlp``; it takes over lin1, lin2 and act."""
        check_width("bottleneck", bottleneck)
        _check_index(index)
        module = super().from_mlp(mlp, bottleneck, dropout)
        module.add_coefficients(bottleneck, 1, index, shared)
        module.reset_coefficients()
        return module

    def reset_adapter(self) -> None:
        """Initialise the adapter's parameters anew."""
        super().reset_adapter()
        if "gamma" in self._parameters:  # the base class calls this before they exist
            self.reset_coefficients()

    def factors(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.share()
        return weight, bias

    def between(self, h: Tensor) -> Tensor:
        coefficients = (self.FacT_c[0] @ self.FacT_p)[:, self.first] + self.gamma
        return (h * coefficients) @ quaternion(self.heads[0])

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.named_parameters(recurse=False)
        yield from super().adapter_parameters()

    def adapter_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.published_state():
            if not name.startswith(("lin1.", "lin2.", "act.")):
                yield name, value

    def backends(self) -> dict[str, str]:
        return {**super().backends(), **self.fold_backends()}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, index={self.first}"


def _check_index(index: int) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"index is {index!r}; it must be a whole number of at least 0")
