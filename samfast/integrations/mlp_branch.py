# SPDX-License-Identifier: Apache-2.0
"""micro-sam's AdaptFormer around the MLP of a block."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.adapters.foreign import Foreign, ForeignModule
from samfast.integrations.linears import (
    held_problem,
    kinds_problem,
    mlp_problem,
    now_problem,
    stamp,
)
from samfast.integrations.probe import Marking, shell
from samfast.integrations.wrapper_proof import drawn_linear, own_problem

_MLP = ("lin1", "lin2", "act")


class BranchSizes(NamedTuple):
    """Sizes of an AdaptFormer.  alpha: None if a Parameter   dropout: True if it has one"""

    features: int
    bottleneck: int
    alpha: float | None
    biases: tuple[bool, bool]
    dropout: bool


class FusedBranchMlp(ForeignModule):
    """micro-sam's AdaptFormer around an MLP.

    x: (..., D) -> (..., D) = mlp(x) + x + α · (drop(act(down(x))) upᵀ + b_up)

    α is multiplied into up, which is small, so that its gradient keeps no map. The rest runs by its
    submodules. A fused block cannot run it, because it adds x itself and has no norm before the
    branch.
    """

    reads: ClassVar[tuple[str, ...]] = (
        *("mlp_proj", "down_proj", "non_linear_func", "up_proj"),
        *("alpha", "dropout", "dropout_layer"),
    )

    def forward(self, x: Tensor) -> Tensor:
        """Run x: (B, H, W, D) -> (B, H, W, D), fused if nothing prevents it."""
        if x.dim() != 4 or self.block_problem() is not None:
            return super().forward(x)
        base = self.mlp_proj(x)
        z = self.non_linear_func(self.down_proj(x))
        if self.dropout is not None:
            z = self.dropout_layer(z)
        up, alpha = self.up_proj, self.alpha
        y = F.linear(z, alpha * up.weight, None if up.bias is None else alpha * up.bias)
        if isinstance(alpha, Tensor) and alpha.dim() > 0:  # their product promotes
            y = y.to(torch.promote_types(y.dtype, alpha.dtype))
        return y + x + base

    @property
    def lin1(self) -> nn.Module:
        return self._inside().lin1

    @property
    def lin2(self) -> nn.Module:
        """The second layer of the inner MLP."""
        return self._inside().lin2

    @property
    def act(self) -> nn.Module:
        """The activation of the inner MLP."""
        return self._inside().act

    def _inside(self) -> Foreign:
        """The MLP."""
        return self._modules["mlp_proj"]

    def block_problem(self) -> str | None:
        """Say why the owner's forward runs; None if this class's does."""
        up: Foreign = self._modules["up_proj"]
        alpha = self.alpha
        reason = own_problem(self) or now_problem({"up_proj": up})
        if reason is None and isinstance(alpha, Tensor) and alpha.dtype != up.weight.dtype:
            names = [str(t.dtype).removeprefix("torch.") for t in (alpha, up.weight)]
            return f"has an alpha of {names[0]} and an up_proj of {names[1]}"
        return reason

    def side_problem(self) -> str:
        """Say why it cannot take part in a fused block."""
        return "mlp adds its input to its result, which a fused block does not"

    def block_side(self, x: Tensor) -> NoReturn:
        """Return what the branch passes to a fused block."""
        raise NotImplementedError(self.side_problem())

    def backends(self) -> dict[str, str]:
        """Map the branch's operation to the backend that would run it here."""
        return {}

    @staticmethod
    def stamp(module: Foreign) -> tuple[Any, ...]:
        alpha, inside = module._parameters.get("alpha"), module._modules.get("mlp_proj")
        names = () if inside is None else tuple(inside._modules)
        shape = None if alpha is None else alpha.shape
        return *stamp(module, "alpha", "dropout"), names, shape

    @classmethod
    def structure(cls, module: Foreign) -> str | None:
        dropout = getattr(module, "dropout", None)
        children = ["mlp_proj", "down_proj", "non_linear_func", "up_proj"]
        if dropout is not None or module._modules.get("dropout_layer") is not None:
            children.append("dropout_layer")
        reason = held_problem(module, tuple(children), ("alpha",))
        if reason is None:
            reason = mlp_problem(module._modules["mlp_proj"], "mlp_proj", _MLP)
        if reason is not None:
            return reason
        down, up = layers = [module._modules[name] for name in ("down_proj", "up_proj")]
        reason = kinds_problem(dict(zip(("down_proj", "up_proj"), layers, strict=True)))
        if reason is not None:
            return reason
        if tuple(up.weight.shape) != tuple(reversed(down.weight.shape)):
            return "has an up_proj that does not lead back from its down_proj"
        return _alpha_problem(module)

    @staticmethod
    def sizes(module: Foreign) -> BranchSizes:
        down, up = module._modules["down_proj"], module._modules["up_proj"]
        bottleneck, features = down.weight.shape
        alpha = None if isinstance(module.alpha, Tensor) else float(module.alpha)
        biases = down.bias is not None, up.bias is not None
        return BranchSizes(
            features, bottleneck, alpha, biases, getattr(module, "dropout", None) is not None
        )

    @staticmethod
    def small(sizes: BranchSizes) -> BranchSizes:
        return sizes._replace(features=6, bottleneck=4)

    @staticmethod
    def width(sizes: BranchSizes) -> int:
        return sizes.features

    @staticmethod
    def stand_in(
        kind: type[nn.Module], sizes: BranchSizes, generator: torch.Generator
    ) -> nn.Module:
        width, narrow = sizes.features, sizes.bottleneck
        parts: dict[str, nn.Module | nn.Parameter] = {
            "mlp_proj": drawn_linear(generator, width, width),
            "down_proj": drawn_linear(generator, width, narrow, sizes.biases[0]),
            "non_linear_func": nn.ReLU(),
            "up_proj": drawn_linear(generator, narrow, width, sizes.biases[1]),
            "dropout_layer": Marking(),
        }
        values: dict[str, object] = {"dropout": 0.5 if sizes.dropout else None}
        if sizes.alpha is None:
            parts["alpha"] = nn.Parameter(torch.tensor([0.75]))
        else:
            values["alpha"] = sizes.alpha
        return shell(kind, values, **parts)

    @staticmethod
    def formula(sizes: BranchSizes) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        def branch(x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
            down, up = (
                (given[f"{name}.weight"], given.get(f"{name}.bias"))
                for name in ("down_proj", "up_proj")
            )
            alpha = given["alpha"] if sizes.alpha is None else sizes.alpha
            z = F.relu(F.linear(x, *down))
            y = alpha * F.linear(Marking()(z) if sizes.dropout else z, *up)
            return y + x + F.linear(x, given["mlp_proj.weight"])

        return branch


def _alpha_problem(module: Foreign) -> str | None:
    alpha = getattr(module, "alpha", None)
    if isinstance(alpha, Tensor):
        scalar = alpha.numel() == 1 and alpha.dim() < 2
        return None if scalar else f"has an alpha of shape {tuple(alpha.shape)}"
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        return f"has an alpha that is a {type(alpha).__name__}, not a number"
    return None
