# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT: the tensors that all layers of a model share, and LoRA under them.

The coefficients and heads of all layers are folded into their factors in one operation at the
start of an encoder's forward. Each layer is handed its share for the length of that forward and
keeps nothing; a layer that is called alone, or recomputed by a checkpoint, folds its own.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from samfast.backends import requested
from samfast.functional import cobot_fold
from samfast.kernels.cobot_fold.op import fold_backend
from samfast.modules.low_rank import check_rank
from samfast.modules.published import Published, PublishedNames
from samfast.modules.qkv_lora import QkvLora

QUARTERS = ("r", "i", "j", "k")


def check_width(name: str, width: int) -> None:
    """Raise ValueError when a quaternion head cannot have this width."""
    check_rank(width)
    if width % 4:
        raise ValueError(f"{name} is {width}, but the four parts of a quaternion must divide it")


def relation(width: int, slices: int, weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """FacT_c (1, V, S), ones, and FacT_p (S, S), the identity, for S slices of a model.

    On the device of a weight that they work beside, float64 beside float64 and float32 otherwise.
    """
    wide = weight.dtype == torch.float64
    options = {"device": weight.device, "dtype": torch.float64 if wide else torch.float32}
    c, p = torch.ones(1, width, slices, **options), torch.eye(slices, **options)
    return nn.Parameter(c), nn.Parameter(p)


class CobotLayer(PublishedNames):
    """Mixin of a layer whose factors of low rank are under SAM-COBOT's coefficients and heads.

    FacT_c, FacT_p: of the whole model, the same Parameters in every layer   gamma: (n·V,), ones
    heads: (n, 4, V/4, V/4), r zeros, i, j and k uniform in (0, 1)
    first: the layer's first slice   own: number n of its slices   FOLDED: names of what is folded
    """

    FOLDED: tuple[str, ...] = ()
    down = False

    def add_coefficients(
        self, width: int, own: int, first: int, shared: Sequence[nn.Parameter] | None
    ) -> None:
        """Register the tensors; ``shared`` None makes a relation of this layer alone."""
        like = self.get_parameter(self.FOLDED[0])
        options = {"device": like.device, "dtype": like.dtype}
        if shared is None:
            shared = relation(width, first + own, like)
        slices = shared[1].shape[0]
        if first < 0 or first + own > slices:
            raise ValueError(
                f"slices {first} to {first + own - 1} are outside the relation matrix of {slices}"
            )
        if shared[0].shape[1] != width:
            raise ValueError(
                f"the relation has {shared[0].shape[1]} coefficients a slice, but the layer's "
                f"bottleneck has {width}"
            )
        self.first, self.own = first, own
        self.FacT_c, self.FacT_p = shared
        self.gamma = nn.Parameter(torch.empty(own * width, **options))
        quarter = width // 4
        self.heads = nn.Parameter(torch.empty(own, 4, quarter, quarter, **options))
        self.given: tuple[Tensor, ...] | None = None  # what the model's forward has folded

    def reset_coefficients(self) -> None:
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.heads[:, 0])
        nn.init.uniform_(self.heads[:, 1:])

    def sources(self) -> list[Tensor]:
        """What the fold takes of this layer: gamma, heads, factor and perhaps bias."""
        return [self.gamma, self.heads, *(self.get_parameter(name) for name in self.FOLDED)]

    def folded(self) -> tuple[Tensor, ...]:
        """The layer's factor, and bias, with coefficients and heads folded in."""
        if self.given is None:
            return fold([self])[0]
        if not torch.is_grad_enabled() or not self.given[0].requires_grad:
            return self.given
        return _Given.apply(len(self.given), *self.given, self.FacT_c, self.FacT_p, *self.sources())

    def relation_parameters(self) -> Iterator[nn.Parameter]:
        yield from (self.FacT_c, self.FacT_p, self.gamma, self.heads)

    def adapter_state(self) -> Iterator[tuple[str, Tensor]]:
        return self.published_state()

    def published(self) -> Published:
        heads = [f"FacT_d{s + 1}.{q}_weight" for s in range(self.own) for q in QUARTERS]
        return {"heads": (heads, self.heads.shape[2:])}

    def fold_backends(self) -> dict[str, str]:
        factor = self.get_parameter(self.FOLDED[0])
        try:
            return {"cobot_fold": fold_backend(requested("auto"), self.FacT_c, factor)}
        except RuntimeError as error:
            return {"cobot_fold": str(error)}


def fold(layers: Sequence[CobotLayer]) -> list[tuple[Tensor, ...]]:
    """(factor, bias if there is one) of each of these layers, whose slices follow one another."""
    lead = layers[0]
    gammas, heads, factors, *biases = zip(*(layer.sources() for layer in layers), strict=True)
    folded, shifts = cobot_fold(
        lead.FacT_c, lead.FacT_p, gammas, heads, factors, biases[0] if biases else (), lead.first,
        down=lead.down,
    )  # fmt: skip
    return list(zip(folded, shifts, strict=True)) if lead.down else [(f,) for f in folded]


class _Given(torch.autograd.Function):
    """What was folded for all layers, for one of them.

    It saves what folding alone saves, so that a checkpoint may record the one and recompute the
    other: of a recomputation only the saved tensors are used.
    """

    @staticmethod
    def forward(ctx, count, *tensors):
        ctx.save_for_backward(*tensors[count:])
        ctx.others = len(tensors) - count
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        return None, *grads, *[None] * ctx.others


class CobotForward:
    """Folds for all layers of one encoder while it runs. Copies and pickles go with the model."""

    def __init__(self, layers: Sequence[CobotLayer]):
        self.layers = list(layers)

    def install(self, encoder: nn.Module) -> None:
        encoder.register_forward_pre_hook(self.open)
        encoder.register_forward_hook(self.close, always_call=True)

    def open(self, encoder: nn.Module, args) -> None:
        if not self._together() or getattr(encoder, "_is_replica", False):
            return
        for layer, given in zip(self.layers, fold(self.layers), strict=True):
            layer.given = given

    def close(self, encoder: nn.Module, args, result) -> None:
        for layer in self.layers:
            layer.given = None

    def _together(self) -> bool:
        """Whether one operation can fold all: they still share, and none is merged or apart."""
        lead = self.layers[0]
        like = [(t.shape, t.dtype, t.device) for t in lead.sources()]
        return all(
            not layer.merged
            and layer.FacT_c is lead.FacT_c
            and layer.FacT_p is lead.FacT_p
            and [(t.shape, t.dtype, t.device) for t in layer.sources()] == like
            for layer in self.layers
        )


class CobotQkvLora(CobotLayer, QkvLora):
    """A packed qkv layer whose q and v get LoRA under SAM-COBOT (CVPR 2024).

    x: (..., in_features) -> (..., out_features) = x Wᵀ + b; on q and on v it adds
    ((c_m + γ) ⊙ x Aᵀ) W_m Bᵀ with c_m = (C P)[:, m] for slice m of the model and the quaternion
    matrix W_m of a head, without scaling.

    lora_A: (2·rank, in_features), lora_B: (2·L, rank), L = out_features / 3, q's above v's, each
        Xavier normal, so that the update does not start at zero; with ``zero_start`` B is zeros
    FacT_c (C): (1, rank, S), FacT_p (P): (S, S), shared by all layers of a model; gamma: (2·rank,)
    heads: (2, 4, rank/4, rank/4)

    shared: FacT_c and FacT_p of a model, None for those of this layer alone
    index: number of the layer among those that share; its slices are 2·index and 2·index + 1
    The state dict has the published names: linear_a_q.weight, linear_b_q.weight, linear_a_v.weight,
    linear_b_v.weight, gamma, FacT_c, FacT_p, FacT_d1.{r,i,j,k}_weight (q) and FacT_d2 (v).
    Saves for backward what LoRA saves. Raises ValueError for a rank that four does not divide and
    for an index outside the relation matrix.
    """

    FOLDED = ("lora_B",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 4,
        shared: Sequence[nn.Parameter] | None = None,
        index: int = 0,
        zero_start: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        self.check_sizes(in_features, out_features, rank)
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"index is {index!r}; it must be a whole number of at least 0")
        self.zero_start = zero_start
        super().__init__(in_features, out_features, rank, bias=bias, device=device, dtype=dtype)
        self.add_coefficients(rank, 2, 2 * index, shared)
        self.reset_coefficients()

    @staticmethod
    def check_sizes(in_features: int, out_features: int, rank: int) -> None:
        check_width("rank", rank)
        QkvLora.check_sizes(in_features, out_features, rank)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 4,
        shared: Sequence[nn.Parameter] | None = None,
        index: int = 0,
        zero_start: bool = False,
    ) -> "CobotQkvLora":
        """SAM-COBOT around a packed qkv layer, with the same weight and bias Parameters."""
        check_width("rank", rank)
        shared = shared or relation(rank, 2 * (index + 1), linear.weight)
        module = cls._from_linear(
            linear, rank=rank, shared=shared, index=index, zero_start=zero_start
        )
        module.FacT_c, module.FacT_p = shared  # all tensors of an adapter were made anew
        return module

    def reset_adapter(self) -> None:
        for whole in (self.lora_A, self.lora_B):
            for part in whole.chunk(2):
                nn.init.xavier_normal_(part)
        if self.zero_start:
            nn.init.zeros_(self.lora_B)
        if "gamma" in self._parameters:  # the layer below calls this before they exist
            self.reset_coefficients()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.folded()[0]

    def backends(self) -> dict[str, str]:
        return {**super().backends(), **self.fold_backends()}

    def published(self) -> Published:
        a, b = (self.rank, self.in_features), (self.out_features // 3, self.rank)
        return {
            "lora_A": (["linear_a_q.weight", "linear_a_v.weight"], a),
            "lora_B": (["linear_b_q.weight", "linear_b_v.weight"], b),
            **super().published(),
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, index={self.first // 2}"
