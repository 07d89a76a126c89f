# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT's AdaptFormer around the MLP of a block, alone and related across blocks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.adapters.block_layer import dropout_seed
from samfast.adapters.foreign import Foreign, ForeignModule
from samfast.backends import requested
from samfast.functional import adapt_former, cobot_fold
from samfast.integrations.cobot_qkv import fold_choice
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
from samfast.integrations.linears import (
    held_problem,
    hook_problem,
    kind_problem,
    kinds_problem,
    mlp_problem,
    number_problem,
    shape_problem,
    stamp,
    takes,
    value_problem,
    weight_of,
)
from samfast.integrations.plain_code import PlainCode
from samfast.integrations.probe import deviation, difference, shell, where_it_runs
from samfast.integrations.wrapper_proof import Run, draw, drawn_linear, own_problem
from samfast.kernels._common.autocast import autocast_dtype, autocast_input
from samfast.kernels.adapt_former.engine import backend_of
from samfast.kernels.cobot_fold.reference import quaternion
from samfast.kernels.sam_block.plan import SidePlan
from samfast.methods.adapt_former.layer import BlockSide

_MLP = ("lin1", "lin2", "act")
_NORM, _LAYERS, _ACT = "adapter_layer_norm_before", ("down_proj", "up_proj"), "non_linear_func"
_SEED = 7
_INSIDE = (
    PlainCode(nn.LayerNorm, frozenset(("normalized_shape", "weight", "bias", "eps"))),
    PlainCode(nn.ReLU, frozenset(("inplace", "relu"))),
)


class AdapterSizes(NamedTuple):
    """Sizes of a branch.  scale: None for a Parameter   head: None without a relation"""

    features: int
    bottleneck: int
    scale: float | None
    biases: tuple[bool, bool]
    eps: float
    dropout: float = 0.0
    slices: int = 0
    first: int = 0
    head: Head | None = None


class FusedAdapter(ForeignModule):
    """SAM-COBOT's AdaptFormer around an MLP, by samfast's operators.

    x: (B, H, W, D) -> (B, H, W, D) = mlp(x) + s · (drop(ReLU(LN(x) downᵀ + b_down)) upᵀ + b_up)

    Alone it runs the MLP inside as that is; a fused block takes both. Dropout has the same
    distribution as the owner's, but other random numbers. With ``add_residual`` or ``residual``
    given, or an x that is not a batch of maps, the owner's forward runs.
    """

    takes = "(self, x, add_residual=True, residual=None)"
    tensors: ClassVar[tuple[str, ...]] = ()
    more: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = (
        *("mlp", "adapter_layernorm_option", _NORM, _ACT, *_LAYERS, "scale"),
        *("dropout", "training"),
    )

    def forward(self, x: Tensor, add_residual: bool = True, residual: Any = None) -> Tensor:
        """Run x: (B, H, W, D) -> (B, H, W, D), fused if nothing prevents it."""
        asked = x.dim() == 4 and add_residual is True and residual is None
        if not asked or not takes(x, self._down_weight()) or self.block_problem() is not None:
            return super().forward(x, add_residual, residual)
        base = self.mlp(x)
        narrow = autocast_dtype(x.device.type) is not None
        if base.shape != x.shape or not (narrow or base.dtype == x.dtype):
            return super().forward(x)  # runs the MLP again: with base given it may do other things
        parts: dict[str, Foreign] = self._modules
        norm, up, scale = parts[_NORM], parts["up_proj"], self.scale
        y = adapt_former(
            x, base, norm.weight, norm.bias, *self._down(), scale * up.weight, scale * up.bias,
            eps=norm.eps, dropout=float(self.dropout) if self.training else 0.0,
        )  # fmt: skip
        if isinstance(scale, Tensor) and scale.dim() > 0:  # as the product of both would be
            y = y.to(torch.promote_types(y.dtype, scale.dtype))
        return y

    def _down_weight(self) -> Tensor:
        return weight_of(self._modules["down_proj"])

    def _down(self) -> tuple[Tensor, Tensor]:
        """Return down and its bias as the branch takes them."""
        down: Foreign = self._modules["down_proj"]
        return down.weight, down.bias

    @property
    def lin1(self) -> nn.Module:
        """Return the first layer of the MLP inside."""
        return self._inside().lin1

    @property
    def lin2(self) -> nn.Module:
        """Return the second layer of the MLP inside."""
        return self._inside().lin2

    @property
    def act(self) -> nn.Module:
        """Return the activation of the MLP inside."""
        return self._inside().act

    def _inside(self) -> Foreign:
        """Return the MLP inside."""
        return self._modules["mlp"]

    def block_problem(self) -> str | None:
        """Say why the owner's forward runs; None if this class's does."""
        return own_problem(self) or now_problem_of(self._read(), self._parts())

    @property
    def mlp_inside(self) -> nn.Module:
        """Return the MLP inside, whose class a fused block checks."""
        return self._inside()

    def side_problem(self) -> str | None:
        """Say why it cannot take part in a fused block; None if it can."""
        if (problem := self.block_problem()) is not None:
            return f"mlp {problem}"
        inside = self._inside()
        problem = hook_problem({"mlp": inside}) or held_problem(inside, _MLP)
        if problem is None and isinstance(self.scale, Tensor):
            return "mlp has a scale that is a tensor, which a fused block does not take"
        return problem and f"mlp {problem}"

    def block_side(self, x: Tensor) -> BlockSide:
        """Return what the branch passes to a fused block; x is the input of the products."""
        parts: dict[str, Foreign] = self._modules
        norm, up, scale = parts[_NORM], parts["up_proj"], self.scale
        dropout = float(self.dropout) if self.training else 0.0
        ups = (up.weight, up.bias) if scale == 1.0 else (scale * up.weight, scale * up.bias)
        tensors = [norm.weight, norm.bias, *self._down(), *ups, dropout_seed(dropout, x)]
        return BlockSide(SidePlan(float(norm.eps), dropout), tensors)

    def _parts(self) -> dict[str, Foreign]:
        parts: dict[str, Foreign] = self._modules
        return {name: parts[name] for name in (_NORM, *_LAYERS, _ACT, *self.more)}

    def _read(self) -> dict[str, Tensor]:
        """Return the tensors of the branch."""
        found = {name: getattr(self, name) for name in self.tensors}
        if isinstance(self.scale, Tensor):
            found["scale"] = self.scale
        for name, part in self._parts().items():
            found |= {f"{leaf} of {name}": p for leaf, p in part.named_parameters()}
        return found

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that would run the branch here."""
        if self.block_problem() is not None:
            return {}
        weight = self._down_weight()
        x, width = autocast_input(weight.detach()[:0]), weight.shape[0]
        try:
            return {"adapt_former": backend_of(requested("auto"), x, width, x.dtype)}
        except RuntimeError as error:
            return {"adapt_former": str(error)}

    @classmethod
    def stamp(cls, module: Foreign) -> tuple[Any, ...]:
        inside, norm = module._modules.get("mlp"), module._modules.get(_NORM)
        names = () if inside is None else tuple(inside._modules)
        own = [(n, p.shape) for n, p in module._parameters.items() if p is not None]
        option = vars(module).get("adapter_layernorm_option"), getattr(norm, "eps", None)
        shape = getattr(norm, "normalized_shape", None), getattr(norm, "bias", None) is None
        numbers = stamp(module, "scale", "dropout", "idx")
        return *numbers, names, *own, *option, *shape

    @classmethod
    def codes(cls, module: Foreign) -> list[PlainCode]:
        """Return the code of the norm and of the activation."""
        return list(_INSIDE)

    @classmethod
    def structure(cls, module: Foreign) -> str | None:
        children = ("mlp", _NORM, *_LAYERS, _ACT, *cls.more)
        reason = held_problem(module, children, ("scale", *cls.tensors))
        if reason is not None:
            return reason
        if (reason := value_problem(module, {"adapter_layernorm_option": "in"})) is not None:
            return reason
        if (reason := mlp_problem(module._modules["mlp"], "mlp", _MLP)) is not None:
            return reason
        norm, act = module._modules[_NORM], module._modules[_ACT]
        if type(norm) is not nn.LayerNorm:
            return kind_problem(_NORM, norm, "nn.LayerNorm")
        if type(act) is not nn.ReLU:
            return kind_problem(_ACT, act, "nn.ReLU")
        layers = {name: module._modules[name] for name in _LAYERS}
        if (reason := kinds_problem(layers)) is not None:
            return reason
        down, up = layers.values()
        for name, layer in {_NORM: norm, **layers}.items():
            if layer.bias is None:
                return f"has a {name} without a bias"
        shape = tuple(up.weight.shape)
        if shape != tuple(reversed(down.weight.shape)) or shape[:1] != norm.normalized_shape:
            return "has an up_proj that does not lead back from its down_proj"
        return _numbers_problem(module)

    @classmethod
    def sizes(cls, module: Foreign) -> AdapterSizes:
        down, up = (module._modules[name] for name in _LAYERS)
        bottleneck, features = down.weight.shape
        scale = None if isinstance(module.scale, Tensor) else float(module.scale)
        biases = down.bias is not None, up.bias is not None
        return AdapterSizes(features, bottleneck, scale, biases, module._modules[_NORM].eps)

    @staticmethod
    def small(sizes: AdapterSizes) -> AdapterSizes:
        return sizes._replace(features=6)

    @staticmethod
    def width(sizes: AdapterSizes) -> int:
        return sizes.features

    @classmethod
    def runs(cls, sizes: AdapterSizes) -> list[Run]:
        """Compare in eval, in training with the owner's random numbers, and at full size.

        Maps are square, since quaternion layers may take no others.
        """
        small = cls.small(sizes)
        dropped = small._replace(dropout=0.5)
        formula = cls.formula(small)
        in_eval, runs_in_eval = (
            functools.partial(compare, modes=(False,)) for compare in (difference, where_it_runs)
        )
        return [
            Run(small, formula, in_eval, (3, 7, 7)),
            Run(small, formula, runs_in_eval, (3, 6, 7)),
            Run(small, formula, deviation, (2, 5, 5)),
            Run(dropped, cls.formula(dropped), _seeded, (3, 7, 7)),
            Run(sizes, cls.formula(sizes), deviation, (1, 5, 5)),
        ]

    @classmethod
    def stand_in(
        cls, kind: type[nn.Module], sizes: AdapterSizes, generator: torch.Generator
    ) -> nn.Module:
        width, narrow = sizes.features, sizes.bottleneck
        norm = nn.LayerNorm(width, eps=sizes.eps)
        norm.weight = nn.Parameter(draw(generator, width))
        norm.bias = nn.Parameter(draw(generator, width))
        parts: dict[str, nn.Module | nn.Parameter] = {
            "mlp": drawn_linear(generator, width, width),
            _NORM: norm,
            "down_proj": drawn_linear(generator, width, narrow, True),
            _ACT: nn.ReLU(),
            "up_proj": drawn_linear(generator, narrow, width, True),
            **cls.relation(sizes, generator),
        }
        values: dict[str, object] = {"adapter_layernorm_option": "in", "dropout": sizes.dropout}
        values["idx"] = sizes.first
        if sizes.scale is None:
            parts["scale"] = nn.Parameter(torch.tensor([0.75]))
        else:
            values["scale"] = sizes.scale
        return shell(kind, values, **parts)

    @classmethod
    def relation(
        cls, sizes: AdapterSizes, generator: torch.Generator
    ) -> dict[str, nn.Module | nn.Parameter]:
        """Return further parts of a stand-in."""
        return {}

    @classmethod
    def between(cls, sizes: AdapterSizes, given: Mapping[str, Tensor], h: Tensor) -> Tensor:
        """Return what the ReLU takes."""
        return h

    @classmethod
    def formula(cls, sizes: AdapterSizes) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        def branch(x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
            norm, down, up = (
                (given[f"{name}.weight"], given[f"{name}.bias"]) for name in (_NORM, *_LAYERS)
            )
            scale = given["scale"] if sizes.scale is None else sizes.scale
            h = F.linear(F.layer_norm(x, (sizes.features,), *norm, sizes.eps), *down)
            z = F.relu(cls.between(sizes, given, h))
            if sizes.dropout > 0.0:
                torch.manual_seed(_SEED)
                z = F.dropout(z, sizes.dropout)
            return F.linear(x, given["mlp.weight"]) + scale * F.linear(z, *up)

        return branch


class FusedRelatedAdapter(FusedAdapter):
    """SAM-COBOT's AdaptFormer with coefficients related across blocks and a head.

    x: (B, H, W, D) -> (B, H, W, D) = mlp(x) + s · (drop(ReLU(((c + γ) ⊙ h) W)) upᵀ + b_up)
    with h = LN(x) downᵀ + b_down

    See ``FusedAdapter`` and ``CobotAdaptFormerMlp``. Coefficients and head are folded into down at
    every forward. ``CP``, which the owner's forward leaves behind, is not set.
    """

    stores = ("CP",)
    tensors = RELATION
    more = ("FacT_d1",)
    reads = (*FusedAdapter.reads, *RELATION, "FacT_d1", "idx")

    def _down(self) -> tuple[Tensor, Tensor]:
        heads = quarters_of([self._modules["FacT_d1"]])
        weight, bias = super()._down()
        folded, shifts = cobot_fold(
            self.FacT_c, self.FacT_p, [self.gamma], [heads], [weight], [bias], self.idx, down=True
        )
        return folded[0], shifts[0]

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that would run the branch here."""
        found = super().backends()
        return found and {**found, "cobot_fold": fold_choice(self, self._down_weight())}

    @classmethod
    def stamp(cls, module: Foreign) -> tuple[Any, ...]:
        return *super().stamp(module), head_stamp(module._modules.get("FacT_d1"))

    @classmethod
    def codes(cls, module: Foreign) -> list[PlainCode]:
        """Return the code of the norm, of the activation and of the head."""
        head = module._modules.get("FacT_d1")
        return [*_INSIDE, *([] if head is None else [code_of(type(head))])]

    @classmethod
    def structure(cls, module: Foreign) -> str | None:
        if (reason := super().structure(module)) is not None:
            return reason
        width = module._modules["down_proj"].weight.shape[0]
        reason = relation_problem(module, width, 1)
        return reason or head_problem("FacT_d1", module._modules["FacT_d1"], width)

    @classmethod
    def sizes(cls, module: Foreign) -> AdapterSizes:
        slices, head = module.FacT_p.shape[0], head_of(module._modules["FacT_d1"])
        return super().sizes(module)._replace(slices=slices, first=module.idx, head=head)

    @classmethod
    def relation(
        cls, sizes: AdapterSizes, generator: torch.Generator
    ) -> dict[str, nn.Module | nn.Parameter]:
        width, slices = sizes.bottleneck, sizes.slices
        assert sizes.head is not None
        head = drawn_head(sizes.head, width, functools.partial(draw, generator))
        shapes = (1, width, slices), (slices, slices), (width,)
        tensors = {
            n: nn.Parameter(draw(generator, *s)) for n, s in zip(RELATION, shapes, strict=True)
        }
        return {"FacT_d1": head, **tensors}

    @classmethod
    def between(cls, sizes: AdapterSizes, given: Mapping[str, Tensor], h: Tensor) -> Tensor:
        coefficients = (given["FacT_c"][0] @ given["FacT_p"])[:, sizes.first] + given["gamma"]
        head = torch.stack([given[f"FacT_d1.{c}_weight"] for c in "rijk"])
        return (h * coefficients) @ quaternion(head)


def _numbers_problem(module: Foreign) -> str | None:
    scale: Any = getattr(module, "scale", None)
    dropout: Any = vars(module).get("dropout")
    if isinstance(scale, Tensor) and (scale.numel() != 1 or scale.dim() > 1):
        return shape_problem({"scale": (scale, (1,))})
    if not isinstance(scale, Tensor) and (reason := number_problem("scale", scale)) is not None:
        return reason
    if type(dropout) not in (int, float) or not 0.0 <= dropout < 1.0:
        return f"has a dropout of {dropout!r}"
    return None


def _seeded(
    module: nn.Module, formula: Callable[[Tensor, Mapping[str, Tensor]], Tensor], x: Tensor
) -> str | None:
    """Run ``difference`` in train mode with the random numbers of one seed."""
    module.register_forward_pre_hook(_seed)
    return difference(module, formula, x, (True,))


def _seed(module: nn.Module, args: Any) -> None:
    torch.manual_seed(_SEED)
