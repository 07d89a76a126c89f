# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer: a branch with a bottleneck next to the MLP of a transformer block."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.adapters.adapted_linear import plain_linear
from samfast.adapters.adapter import Adapter
from samfast.adapters.block_layer import dropout_seed
from samfast.adapters.checks import check_bottleneck, check_dropout
from samfast.adapters.stand_in import altered, kind_of, standing_in
from samfast.backends import requested
from samfast.functional import adapt_former
from samfast.integrations import segment_anything
from samfast.kernels._common.autocast import autocast_input
from samfast.kernels.adapt_former.engine import backend_of
from samfast.kernels.sam_block.plan import SidePlan

if TYPE_CHECKING:

    class MLPBlock(nn.Module):
        """segment_anything's: lin2(act(lin1(x)))."""

        lin1: nn.Linear
        lin2: nn.Linear
        act: nn.Module

        def __init__(self, embedding_dim: int, mlp_dim: int, act: type[nn.Module] = nn.GELU): ...
        def forward(self, x: Tensor) -> Tensor: ...

else:
    MLPBlock = segment_anything.load().modeling.common.MLPBlock
_PARTS: dict[str, type[nn.Module]] = {
    "adapter_layer_norm_before": nn.LayerNorm,
    "down_proj": nn.Linear,
    "up_proj": nn.Linear,
}

Branched = TypeVar("Branched", bound="AdaptFormerMlp")


@dataclass(frozen=True)
class BlockSide:
    """What one call passes to a fused block: the branch next to the MLP."""

    plan: SidePlan
    tensors: list[Tensor | None]


class PlainAdaptFormer(nn.Module):
    """``AdaptFormerMlp`` in evaluation, without samfast's operators, for export.

    x: (..., D) -> (..., D) = lin2(act(lin1(x))) + up(ReLU(down(norm(x))))
    """

    def __init__(
        self,
        lin1: nn.Linear,
        lin2: nn.Linear,
        act: nn.Module,
        norm: nn.LayerNorm,
        down: nn.Linear,
        up: nn.Linear,
    ) -> None:
        super().__init__()
        self.lin1, self.lin2, self.act = lin1, lin2, act
        self.norm, self.down, self.up = norm, down, up

    def forward(self, x: Tensor) -> Tensor:
        base = self.lin2(self.act(self.lin1(x)))
        branch = self.up(F.relu(self.down(self.norm(x.to(self.norm.weight.dtype)))))
        return base + branch.to(base.dtype)


class AdaptFormerMlp(Adapter, MLPBlock):
    """MLP with a branch next to it (AdaptFormer, NeurIPS 2022, placed as in SAM-COBOT).

    x: (..., D) -> (..., D) = mlp(x) + drop(ReLU(LN(x) downᵀ + b_down)) upᵀ + b_up
    adapter_layer_norm_before.{weight, bias}: (D,), ones and zeros
    down_proj.{weight, bias}: (bottleneck, D), Kaiming uniform, and (bottleneck,), zeros
    up_proj.{weight, bias}: (D, bottleneck) and (D,), zeros

    All six are float32 whatever the MLP's dtype, or float64 with a float64 lin1. Dropout acts only
    in training, on the bottleneck. lin1, lin2 and act are the stock module's.
    """

    unmergeable = "whose update is not linear"

    def __init__(
        self,
        embedding_dim: int,
        mlp_dim: int,
        act: type[nn.Module] = nn.GELU,
        bottleneck: int = 16,
        dropout: float = 0.1,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ):
        check_bottleneck(bottleneck)
        check_dropout(dropout)
        super().__init__(embedding_dim, mlp_dim, act)
        self.to(device=device, dtype=dtype)
        self._add_adapter(bottleneck, dropout)

    @classmethod
    def from_mlp(
        cls: type[Branched], mlp: MLPBlock, bottleneck: int = 16, dropout: float = 0.1
    ) -> Branched:
        """Build the module from ``mlp``; it takes over lin1, lin2 and act."""
        if type(mlp) is not MLPBlock:
            raise TypeError(f"expected segment_anything's MLPBlock, got {type(mlp).__name__}")
        cls.check_mlp(mlp)
        check_bottleneck(bottleneck)
        check_dropout(dropout)
        module = standing_in(cls, mlp)
        module._add_adapter(bottleneck, dropout)
        return module

    @staticmethod
    def check_mlp(mlp: MLPBlock) -> None:
        """Raise ValueError if the MLP's output is not as wide as its input, as the branch is."""
        width, out = mlp.lin1.in_features, mlp.lin2.out_features
        if width != out:
            raise ValueError(
                f"expected an MLP with as many outputs as inputs, got {width} inputs and {out} "
                "outputs"
            )

    def _add_adapter(self, bottleneck: int, dropout: float) -> None:
        weight, width = self.lin1.weight, self.lin1.in_features
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        device = weight.device
        self.bottleneck, self.dropout = bottleneck, dropout
        self.adapter_layer_norm_before = nn.LayerNorm(width, device=device, dtype=wide)
        self.down_proj = nn.Linear(width, bottleneck, device=device, dtype=wide)
        self.up_proj = nn.Linear(bottleneck, width, device=device, dtype=wide)
        for part in _PARTS:
            getattr(self, part).train(self.training)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialise the adapter's parameters anew."""
        self.adapter_layer_norm_before.reset_parameters()
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        for zeros in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zeros)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return down (bottleneck, D) and its bias, for the branch."""
        return self.down_proj.weight, self.down_proj.bias

    def forward(self, x: Tensor) -> Tensor:
        """Run the MLP and its branch. x: (..., D) -> (..., D)"""
        base = super().forward(x)
        if self.side_problem() is not None:
            return base + self._in_parts(x).to(base.dtype)
        norm, up = self.adapter_layer_norm_before, self.up_proj
        return adapt_former(
            x, base, norm.weight, norm.bias, *self.factors(), up.weight, up.bias, eps=norm.eps,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def _in_parts(self, x: Tensor) -> Tensor:
        """Run the branch by its submodules, which may have hooks or have been replaced."""
        like = next(self.adapter_layer_norm_before.parameters(), x)
        h = self.down_proj(self.adapter_layer_norm_before(x.to(like.dtype)))
        z = F.relu(self.between(h))
        return self.up_proj(F.dropout(z, self.dropout, self.training))

    def between(self, h: Tensor) -> Tensor:
        """Change the bottleneck before the ReLU, when the submodules run one by one."""
        return h

    def side_problem(self) -> str | None:
        """Say why the branch's submodules run one by one; None if it is one operation."""
        for name, kind in _PARTS.items():
            part = getattr(self, name)
            if type(part) is not kind:
                return f"{name} is {kind_of(part)}"
            if altered(part):
                return f"{name} has hooks or a forward of its own"
        return None

    def block_side(self, x: Tensor) -> BlockSide:
        """Return what the layer passes to a fused block; x is the input of the products."""
        dropout = float(self.dropout) if self.training else 0.0
        norm, up = self.adapter_layer_norm_before, self.up_proj
        tensors = [norm.weight, norm.bias, *self.factors(), up.weight, up.bias]
        seed = dropout_seed(dropout, x)
        return BlockSide(SidePlan(float(norm.eps), dropout), [*tensors, seed])

    @torch.no_grad()
    def plain(self) -> PlainAdaptFormer:
        if (problem := self.side_problem()) is not None:
            raise ValueError(f"has a branch whose {problem}, which an export form would leave out")
        down = plain_linear(*self.factors())
        up = plain_linear(self.up_proj.weight, self.up_proj.bias)
        parts = (self.lin1, self.lin2, self.act, self.adapter_layer_norm_before, down, up)
        return PlainAdaptFormer(*parts)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.named_parameters():
            if name.partition(".")[0] in _PARTS:
                yield name, parameter

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        if self.side_problem() is not None:
            return {}
        x = autocast_input(self.lin1.weight.detach()[:0])
        try:
            name = backend_of(requested("auto"), x, self.bottleneck, x.dtype)
        except RuntimeError as error:
            return {"adapt_former": str(error)}
        return {"adapt_former": name}

    def extra_repr(self) -> str:
        return f"bottleneck={self.bottleneck}, dropout={self.dropout}"
