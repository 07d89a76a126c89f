# SPDX-License-Identifier: Apache-2.0
"""micro-sam's LoRA on both layers of a block's MLP."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.adapters.foreign import Foreign, ForeignModule
from samfast.adapters.low_rank import backend_of
from samfast.integrations.linears import (
    UpdatedLinear,
    held_problem,
    kinds_problem,
    layers_stamp,
    mlp_problem,
    now_problem,
    pair_problem,
    stamp,
    takes,
)
from samfast.integrations.probe import shell
from samfast.integrations.wrapper_proof import drawn_linear, own_problem

_PAIRS = {f"lin{i}": (f"w_a_linear_{i}", f"w_b_linear_{i}") for i in (1, 2)}
_PAIR_NAMES = tuple(name for pair in _PAIRS.values() for name in pair)


class LoraSizes(NamedTuple):
    """Sizes of an MLP and its layers' updates.  biases: True if lin1 and lin2 have one"""

    features: tuple[int, int, int]
    ranks: tuple[int, int]
    biases: tuple[bool, bool]


class FusedMlpLora(ForeignModule):
    """An MLP with unscaled LoRA on its layers, by samfast's operators.

    x: (..., D) -> (..., D) = lin2(act(lin1(x))), where both layers are x Wᵀ + b + x Aᵀ Bᵀ

    It gives a block the lin1, lin2 and act that the block reads. It fuses plain ``nn.Linear``
    layers without hooks. Otherwise the owner's forward runs, and ``block_problem`` says why.
    """

    reads: ClassVar[tuple[str, ...]] = ("mlp_layer", "activation", "lin1", "lin2", *_PAIR_NAMES)

    def forward(self, x: Tensor) -> Tensor:
        """Run x: (B, H, W, D) -> (B, H, W, D), fused if nothing prevents it."""
        if x.dim() != 4 or self.block_problem() is not None or not takes(x, self.lin1.weight):
            return super().forward(x)
        return self.lin2(self.act(self.lin1(x)))

    @property
    def lin1(self) -> UpdatedLinear:
        """The first layer with its update."""
        return self._layer("lin1")

    @property
    def lin2(self) -> UpdatedLinear:
        """The second layer with its update."""
        return self._layer("lin2")

    @property
    def act(self) -> Foreign:
        """The activation of the inner MLP."""
        return self._modules["activation"]

    def block_problem(self) -> str | None:
        """Say why the owner's forward runs; None if samfast's operators do."""
        return own_problem(self) or now_problem(_lora_layers(self))

    def side_problem(self) -> str | None:
        """Say why it cannot take part in a fused block; None if it can."""
        problem = self.block_problem()
        return None if problem is None else f"mlp {problem}"

    def block_side(self, x: Tensor) -> None:
        """Return no branch: only the MLP's own layers have updates."""
        return None

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        if self.block_problem() is not None:
            return {}
        layer = self.lin1
        return backend_of(layer.weight, (layer.lora_a, layer.lora_b))

    def _layer(self, name: str) -> UpdatedLinear:
        parts: dict[str, Foreign] = self._modules
        down, up = (parts[part] for part in _PAIRS[name])
        return UpdatedLinear(parts["mlp_layer"]._modules[name], down, up)

    @staticmethod
    def stamp(module: Foreign) -> tuple[Any, ...]:
        inside = module._modules.get("mlp_layer")
        plain = () if inside is None else layers_stamp(inside._modules)
        return *stamp(module), plain

    @classmethod
    def structure(cls, module: Foreign) -> str | None:
        reason = held_problem(module, ("mlp_layer", "activation", *_PAIR_NAMES))
        if reason is None:
            reason = mlp_problem(module._modules["mlp_layer"], "mlp_layer", tuple(_PAIRS))
        if reason is not None:
            return reason
        layers = _lora_layers(module)
        if (reason := kinds_problem(layers)) is not None:
            return reason
        for name, (down, up) in _PAIRS.items():
            base = layers[name]
            found = pair_problem(name, base, base.weight.shape[0], layers[down], layers[up])
            if found is not None:
                return found
        if layers["lin1"].weight.shape[0] != layers["lin2"].weight.shape[1]:
            return "has a lin2 that does not take what its lin1 gives"
        return None

    @staticmethod
    def sizes(module: Foreign) -> LoraSizes:
        layers = _lora_layers(module)
        first, second = layers["lin1"], layers["lin2"]
        return LoraSizes(
            (first.weight.shape[1], first.weight.shape[0], second.weight.shape[0]),
            (layers["w_b_linear_1"].weight.shape[1], layers["w_b_linear_2"].weight.shape[1]),
            (first.bias is not None, second.bias is not None),
        )

    @staticmethod
    def small(sizes: LoraSizes) -> LoraSizes:
        return sizes._replace(features=(6, 7, 5), ranks=(2, 3))

    @staticmethod
    def width(sizes: LoraSizes) -> int:
        return sizes.features[0]

    @staticmethod
    def stand_in(kind: type[nn.Module], sizes: LoraSizes, generator: torch.Generator) -> nn.Module:
        chain = zip(_PAIRS.items(), sizes.features, sizes.features[1:], sizes.ranks, sizes.biases,
                    strict=False)  # fmt: skip
        plain: dict[str, nn.Module] = {}
        updates: dict[str, nn.Module] = {}
        act = nn.GELU()
        for (name, (down, up)), inputs, outputs, rank, bias in chain:
            plain[name] = drawn_linear(generator, inputs, outputs, bias)
            updates[down] = drawn_linear(generator, inputs, rank)
            updates[up] = drawn_linear(generator, rank, outputs)
        mlp = shell(nn.Module, {}, **plain, act=act)
        return shell(kind, {}, mlp_layer=mlp, **updates, activation=act)

    @staticmethod
    def formula(sizes: LoraSizes) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        def updated(x: Tensor, given: Mapping[str, Tensor], name: str) -> Tensor:
            weight, bias = given[f"mlp_layer.{name}.weight"], given.get(f"mlp_layer.{name}.bias")
            down, up = (given[f"{part}.weight"] for part in _PAIRS[name])
            return F.linear(x, weight, bias) + F.linear(F.linear(x, down), up)

        return lambda x, given: updated(F.gelu(updated(x, given, "lin1")), given, "lin2")


def _lora_layers(module: Foreign) -> dict[str, nn.Linear]:
    """Return lin1, lin2 and the four layers of their updates."""
    inside = module._modules["mlp_layer"]._modules
    plain = {name: inside[name] for name in _PAIRS}
    return plain | {name: module._modules[name] for name in _PAIR_NAMES}
