# SPDX-License-Identifier: Apache-2.0
"""A packed qkv layer in a wrapper that adds low-rank updates to its thirds."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.adapters.block_layer import BlockLayer
from samfast.adapters.foreign import Foreign, ForeignModule
from samfast.adapters.low_rank import backend_of
from samfast.functional import lora_linear
from samfast.integrations.linears import (
    held,
    held_problem,
    kinds_problem,
    now_problem,
    pair_problem,
    stamp,
    takes,
    weight_of,
)
from samfast.integrations.probe import shell
from samfast.integrations.wrapper_proof import drawn_linear, own_problem
from samfast.kernels._common.windows import Windows
from samfast.kernels.sam_block.plan import LayerPlan

THIRDS = ("q", "k", "v")


class Sizes(NamedTuple):
    """Sizes of a packed layer and its updates.  thirds: those with an update"""

    inputs: int
    rank: int
    thirds: tuple[str, ...]
    scaling: float
    bias: bool


class FusedPackedQkv(ForeignModule):
    """A wrapper around a packed qkv layer, by samfast's operators.

    x: (B, H, W, D) -> (B, H, W, 3 · D) = x Wᵀ + b, plus scaling · x Aᵀ Bᵀ on each updated third,
    with its own A and B. micro-sam's may update no third.

    It fuses plain ``nn.Linear`` layers without hooks, on maps. Otherwise the owner's forward runs,
    and ``block_problem`` says why. Every forward reads every tensor anew, so replaced weights take
    effect.

    base: name of the packed layer   pairs: names of A and B by third
    needed: thirds that every such wrapper updates   scale: name of the scaling, "" for none
    more: further children   tensors: parameters of its own
    """

    base: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    pairs: ClassVar[Mapping[str, tuple[str, str]]]
    needed: ClassVar[tuple[str, ...]] = ()
    scale: ClassVar[str] = ""
    more: ClassVar[tuple[str, ...]] = ()
    tensors: ClassVar[tuple[str, ...]] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Run x: (..., D) -> (..., 3 · D), fused if nothing prevents it."""
        if x.dim() != 4 or self.block_problem() is not None or not takes(x, self.weight):
            return super().forward(x)
        if not self._starts():
            return F.linear(x, self.weight, self.bias)
        third = self.weight.shape[1]
        ranges = [(start, start + third) for start in self._starts()]
        return lora_linear(
            x, self.weight, self.bias, *self._factors(), self._scaling(), slices=ranges
        )

    def _packed(self) -> Foreign:
        return self._modules[self.base]

    @property
    def weight(self) -> Tensor:
        """The packed layer's."""
        return weight_of(self._packed())

    @property
    def bias(self) -> Tensor | None:
        """The packed layer's."""
        return self._packed().bias

    @property
    def token_wise(self) -> bool:
        """True if each token is processed on its own and a token of zeros gives the bias."""
        return self.block_problem() is None

    def block_problem(self) -> str | None:
        """Say why the owner's forward runs; None if the layer can take part in a fused block."""
        return own_problem(self) or now_problem(self._linears(self))

    def block_layer(self, x: Tensor, windows: Windows) -> BlockLayer:
        """Return what the layer passes to a fused block; x is the input of the products."""
        starts = self._starts()
        if not starts:
            return BlockLayer(self.weight, self.bias)
        plan = LayerPlan(adapted=True, scaling=self._scaling(), starts=starts, own=len(starts) > 1)
        return BlockLayer(self.weight, self.bias, *self._factors(), plan)

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        if not self._starts() or self.block_problem() is not None:
            return {}
        with torch.no_grad():
            factors = self._factors()
        return backend_of(self.weight, factors, len(self._starts()))

    @classmethod
    def _linears(cls, module: Foreign) -> dict[str, nn.Module]:
        """Return the packed layer and those of the updates."""
        return {name: layer for name, layer in held(module).items() if name not in cls.more}

    def _starts(self) -> tuple[int, ...]:
        """Return the first columns of the updated thirds."""
        third = self.weight.shape[1]
        return tuple([third * THIRDS.index(t) for t in _updated(self, type(self))])

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return the updates' A below each other, and their B."""
        children: dict[str, Foreign] = self._modules
        names = [self.pairs[third] for third in _updated(self, type(self))]
        downs = [weight_of(children[down]) for down, _ in names]
        ups = [weight_of(children[up]) for _, up in names]
        if len(names) == 1:
            return downs[0], ups[0]
        return torch.cat(downs), torch.cat(ups)

    def _scaling(self) -> float:
        return float(getattr(self, self.scale)) if self.scale else 1.0

    @classmethod
    def stamp(cls, module: Foreign) -> tuple[Any, ...]:
        return stamp(module, "dim", cls.scale)

    @classmethod
    def structure(cls, module: Foreign) -> str | None:
        thirds = _updated(module, cls)
        names = [name for third in thirds or cls.needed for name in cls.pairs[third]]
        reason = held_problem(module, (cls.base, *names, *cls.more), cls.tensors)
        if reason is not None:
            return reason
        if absent := [third for third in cls.needed if third not in thirds]:
            return f"has no {cls.pairs[absent[0]][0]}"
        if (reason := kinds_problem(cls._linears(module))) is not None:
            return reason
        base = module._modules[cls.base]
        ranks: dict[int, str] = {}
        outputs, inputs = base.weight.shape
        if outputs != 3 * inputs:
            return f"is over a layer of {inputs} features that gives {outputs}, not {3 * inputs}"
        for third in thirds:
            down, up = (module._modules[name] for name in cls.pairs[third])
            if (reason := pair_problem(third, base, inputs, down, up)) is not None:
                return reason
            ranks[up.weight.shape[1]] = third
        if len(ranks) > 1:
            return f"has updates of ranks {' and '.join(map(str, ranks))}, not of one"
        return cls._numbers_problem(module, inputs)

    @classmethod
    def _numbers_problem(cls, module: Foreign, inputs: int) -> str | None:
        dim = getattr(module, "dim", inputs)
        if type(dim) is not int or dim != inputs:
            return f"has a dim of {dim!r}, while its layer takes {inputs} features"
        scaling = getattr(module, cls.scale, None) if cls.scale else 1.0
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
            return f"has a {cls.scale} that is a {type(scaling).__name__}, not a number"
        return None

    @classmethod
    def sizes(cls, module: Foreign) -> Sizes:
        thirds, base = _updated(module, cls), module._modules[cls.base]
        ups = [module._modules[cls.pairs[third][1]] for third in thirds]
        rank = ups[0].weight.shape[1] if ups else 0
        scaling = float(getattr(module, cls.scale)) if cls.scale else 1.0
        return Sizes(base.weight.shape[1], rank, thirds, scaling, base.bias is not None)

    @staticmethod
    def small(sizes: Sizes) -> Sizes:
        return sizes._replace(inputs=6, rank=2)

    @staticmethod
    def width(sizes: Sizes) -> int:
        return sizes.inputs

    @classmethod
    def stand_in(cls, kind: type[nn.Module], sizes: Sizes, generator: torch.Generator) -> nn.Module:
        width = sizes.inputs
        layers: dict[str, nn.Module] = {
            cls.base: drawn_linear(generator, width, 3 * width, sizes.bias)
        }
        for third in sizes.thirds:
            down, up = cls.pairs[third]
            layers[down] = drawn_linear(generator, width, sizes.rank)
            layers[up] = drawn_linear(generator, sizes.rank, width)
        values: dict[str, object] = {
            "dim": width,
            **({cls.scale: sizes.scaling} if cls.scale else {}),
        }
        return shell(kind, values, **layers)

    @classmethod
    def formula(cls, sizes: Sizes) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        def packed(x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
            y = F.linear(x, given[f"{cls.base}.weight"], given.get(f"{cls.base}.bias"))
            thirds = dict(zip(THIRDS, y.chunk(3, dim=-1), strict=True))
            for third in sizes.thirds:
                down, up = (given[f"{name}.weight"] for name in cls.pairs[third])
                thirds[third] = thirds[third] + sizes.scaling * F.linear(F.linear(x, down), up)
            return torch.cat(list(thirds.values()), dim=-1)

        return packed


def _updated(module: Foreign, kind: type["FusedPackedQkv"]) -> tuple[str, ...]:
    """Return the thirds with an update, or half of one, in the packed layer's order."""
    children, found = module._modules, []
    for third in THIRDS:
        names = kind.pairs.get(third, ())
        if any([children.get(name) is not None for name in names]):
            found.append(third)
    return tuple(found)
