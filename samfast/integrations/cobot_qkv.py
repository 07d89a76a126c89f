# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT's packed qkv layer: LoRA on q and v, coefficients related across blocks, and heads."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.adapters.foreign import Foreign
from samfast.backends import requested
from samfast.functional import cobot_fold
from samfast.integrations.cobot_relation import (
    RELATION,
    Head,
    code_of,
    drawn_head,
    head_of,
    head_problem,
    head_stamp,
    now_problem_of,
    quarters_of,
    relation_problem,
)
from samfast.integrations.linears import stamp, weight_of
from samfast.integrations.packed_qkv import FusedPackedQkv
from samfast.integrations.plain_code import PlainCode
from samfast.integrations.probe import deviation, difference, shell, where_it_runs
from samfast.integrations.wrapper_proof import Run, draw, drawn_linear
from samfast.kernels.cobot_fold.op import fold_backend
from samfast.kernels.cobot_fold.reference import quaternion

_HEADS = ("FacT_d1", "FacT_d2")


class RelatedSizes(NamedTuple):
    """Sizes of a packed layer and of its updates.  slices: of the whole model   first: its own"""

    inputs: int
    rank: int
    slices: int
    first: int
    bias: bool
    heads: tuple[Head, Head]


class FusedRelatedQkv(FusedPackedQkv):
    """SAM-COBOT's packed qkv layer with LoRA on q and v, by samfast's operators.

    See ``FusedPackedQkv`` and ``CobotQkvLora``. Coefficients and heads are folded into B at every
    forward. ``CP``, which the owner's forward leaves behind, is not set.
    """

    base = "qkv"
    pairs = {"q": ("linear_a_q", "linear_b_q"), "v": ("linear_a_v", "linear_b_v")}  # noqa: RUF012
    needed = ("q", "v")
    more = _HEADS
    tensors = RELATION
    stores: ClassVar[tuple[str, ...]] = ("CP",)
    reads: ClassVar[tuple[str, ...]] = (
        *("qkv", "linear_a_q", "linear_b_q", "linear_a_v", "linear_b_v", "dim", "idx"),
        *RELATION,
        *_HEADS,
    )

    def block_problem(self) -> str | None:
        """Say why the owner's forward runs; None if the layer can take part in a fused block."""
        return super().block_problem() or now_problem_of(self._read(), self._heads())

    def _heads(self) -> dict[str, Foreign]:
        return {name: self._modules[name] for name in _HEADS}

    def _read(self) -> dict[str, Tensor]:
        """Return the tensors that the fold reads, and the packed weight."""
        found = {name: getattr(self, name) for name in RELATION}
        for name, head in self._heads().items():
            found |= {f"{part} of {name}": p for part, p in head.named_parameters()}
        return {"weight": self.weight, **found}

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return the updates' A below each other, and their B with the fold in it."""
        lora_a, lora_b = super()._factors()
        heads = quarters_of(self._heads().values())
        folded, _ = cobot_fold(
            self.FacT_c, self.FacT_p, [self.gamma], [heads], [lora_b], first=self.idx
        )
        return lora_a, folded[0]

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        found = super().backends()
        return found and {**found, "cobot_fold": fold_choice(self, weight_of(self.linear_b_q))}

    @classmethod
    def stamp(cls, module: Foreign) -> tuple[Any, ...]:
        shapes = [module._parameters.get(name) for name in RELATION]
        heads = [head_stamp(module._modules.get(name)) for name in _HEADS]
        own = [None if p is None else p.shape for p in shapes]
        return (*stamp(module, "dim", "idx"), *own, *heads)

    @classmethod
    def structure(cls, module: Foreign) -> str | None:
        reason = super().structure(module)
        if reason is not None:
            return reason
        rank = module._modules["linear_b_q"].weight.shape[1]
        reason = relation_problem(module, rank, 2)
        problems = (head_problem(name, module._modules[name], rank) for name in _HEADS)
        return reason or next((p for p in problems if p is not None), None)

    @classmethod
    def codes(cls, module: Foreign) -> list[PlainCode]:
        """Return the code of the heads."""
        heads = [module._modules.get(name) for name in _HEADS]
        return [code_of(type(head)) for head in heads if head is not None]

    @classmethod
    def sizes(cls, module: Foreign) -> Any:
        base, up = module._modules[cls.base], module._modules["linear_b_q"]
        first, second = (head_of(module._modules[name]) for name in _HEADS)
        slices, bias = module.FacT_p.shape[0], base.bias is not None
        width, rank = base.weight.shape[1], up.weight.shape[1]
        return RelatedSizes(width, rank, slices, module.idx, bias, (first, second))

    @staticmethod
    def small(sizes: Any) -> Any:
        return sizes._replace(inputs=6)

    @classmethod
    def runs(cls, sizes: Any) -> list[Run]:
        """Compare on square maps, since quaternion layers may take no others."""
        small = cls.small(sizes)
        formula = cls.formula(small)
        return [
            Run(small, formula, difference, (3, 7, 7)),
            Run(small, formula, where_it_runs, (3, 6, 7)),
            Run(small, formula, deviation, (2, 5, 5)),
            Run(sizes, cls.formula(sizes), deviation, (1, 5, 5)),
        ]

    @classmethod
    def stand_in(cls, kind: type[nn.Module], sizes: Any, generator: torch.Generator) -> nn.Module:
        width, rank, slices = sizes.inputs, sizes.rank, sizes.slices

        def drawn(*shape: int) -> Tensor:
            return draw(generator, *shape)

        parts: dict[str, nn.Module | nn.Parameter] = {
            cls.base: drawn_linear(generator, width, 3 * width, sizes.bias)
        }
        for down, up in cls.pairs.values():
            parts[down] = drawn_linear(generator, width, rank)
            parts[up] = drawn_linear(generator, rank, width)
        for name, head in zip(_HEADS, sizes.heads, strict=True):
            parts[name] = drawn_head(head, rank, drawn)
        shapes = (1, rank, slices), (slices, slices), (2 * rank,)
        for name, shape in zip(RELATION, shapes, strict=True):
            parts[name] = nn.Parameter(drawn(*shape))
        return shell(kind, {"dim": width, "idx": sizes.first}, **parts)

    @classmethod
    def formula(cls, sizes: Any) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        def packed(x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
            y = F.linear(x, given[f"{cls.base}.weight"], given.get(f"{cls.base}.bias"))
            coefficients = (given["FacT_c"][0] @ given["FacT_p"]).t()[sizes.first :]
            thirds, gammas = list(y.chunk(3, dim=-1)), given["gamma"].chunk(2)
            for i, (down, up) in enumerate(cls.pairs.values()):
                head = torch.stack([given[f"{_HEADS[i]}.{c}_weight"] for c in "rijk"])
                h = F.linear(x, given[f"{down}.weight"]) * (coefficients[i] + gammas[i])
                thirds[2 * i] = thirds[2 * i] + F.linear(
                    h @ quaternion(head), given[f"{up}.weight"]
                )
            return torch.cat(thirds, dim=-1)

        return packed


def fold_choice(module: Foreign, factor: Tensor) -> str:
    """Return the backend that would fold here, or why there is none."""
    try:
        return fold_backend(requested("auto"), module.FacT_c, factor)
    except RuntimeError as error:
        return str(error)
