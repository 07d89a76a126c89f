# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT: the tensors that all layers of a model share, and LoRA with them.

One operation at the start of an encoder's forward folds the coefficients and heads of all layers
into their factors. Each layer receives its share for the duration of that forward. A layer that
runs on its own, or in a checkpoint's recomputation, folds its own.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from samfast.adapters.encoder_forward import EncoderForward, SharingLayer
from samfast.adapters.published import Published, PublishedNames
from samfast.backends import requested
from samfast.functional import cobot_fold
from samfast.kernels.cobot_fold.op import fold_backend
from samfast.methods.cobot.checks import check_width
from samfast.methods.lora.qkv_layer import QkvLora

QUARTERS = ("r", "i", "j", "k")


def relation(width: int, slices: int, weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Make FacT_c (1, V, S), ones, and FacT_p (S, S), the identity, for S slices of a model.

    They have the device of the layers' weight; float64 if the weight is, float32 otherwise.
    """
    wide = weight.dtype == torch.float64
    device, dtype = weight.device, torch.float64 if wide else torch.float32
    c = torch.ones(1, width, slices, device=device, dtype=dtype)
    p = torch.eye(slices, device=device, dtype=dtype)
    return nn.Parameter(c), nn.Parameter(p)


class CobotLayer(SharingLayer, PublishedNames):
    """Mixin of a layer with SAM-COBOT's coefficients and heads on its low-rank factors.

    FacT_c, FacT_p: the same Parameters in every layer of the model   gamma: (n·V,), ones
    heads: (n, 4, V/4, V/4), r zeros, i, j and k uniform in (0, 1)
    first: the layer's first slice   own: number n of its slices   FOLDED: names of folded tensors
    """

    FOLDED: tuple[str, ...] = ()
    down = False

    def add_coefficients(
        self, width: int, own: int, first: int, shared: Sequence[nn.Parameter] | None
    ) -> None:
        """Register the tensors; with ``shared`` None, make a relation for this layer only."""
        like = self.get_parameter(self.FOLDED[0])
        if shared is None:
            shared = relation(width, first + own, like)
        slices = shared[1].shape[0]
        if first < 0 or first + own > slices:
            raise ValueError(
                f"slices {first} to {first + own - 1} are outside the relation matrix, which has "
                f"{slices}; pass a smaller index"
            )
        if shared[0].shape[1] != width:
            raise ValueError(
                f"expected {width} coefficients per slice, as the layer's bottleneck has, but the "
                f"shared relation has {shared[0].shape[1]}"
            )
        self.first, self.own = first, own
        self.FacT_c, self.FacT_p = shared
        self.gamma = nn.Parameter(like.new_empty(own * width))
        quarter = width // 4
        self.heads = nn.Parameter(like.new_empty(own, 4, quarter, quarter))

    def reset_coefficients(self) -> None:
        """Set gamma to ones, and draw the heads as published."""
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.heads[:, 0])
        nn.init.uniform_(self.heads[:, 1:])

    def own_sources(self) -> list[Tensor]:
        """Return what the fold takes from this layer: gamma, heads, factor and perhaps bias."""
        return [self.gamma, self.heads, *(attrgetter(name)(self) for name in self.FOLDED)]

    def sources(self) -> list[Tensor]:
        return [self.FacT_c, self.FacT_p, *self.own_sources()]

    def alone(self) -> tuple[Tensor, ...]:
        """Return the layer's factor, and bias, with coefficients and heads folded in."""
        return fold([self])[0]

    def relation_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that may have a learning rate of their own."""
        yield from (self.FacT_c, self.FacT_p, self.gamma, self.heads)

    def adapter_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (published name, tensor) for what files hold."""
        return self.published_state()

    def published(self) -> Published:
        heads = [f"FacT_d{s + 1}.{q}_weight" for s in range(self.own) for q in QUARTERS]
        return {"heads": (heads, self.heads.shape[2:])}

    def fold_backends(self) -> dict[str, str]:
        """Map the fold's operation to the backend that would run it here."""
        factor = attrgetter(self.FOLDED[0])(self)
        try:
            return {"cobot_fold": fold_backend(requested("auto"), self.FacT_c, factor)}
        except RuntimeError as error:
            return {"cobot_fold": str(error)}


def fold(layers: Sequence[CobotLayer]) -> list[tuple[Tensor, ...]]:
    """Fold each of these layers, whose slices are consecutive: (factor, bias if there is one)."""
    lead = layers[0]
    gammas, heads, factors, *biases = zip(*(layer.own_sources() for layer in layers), strict=True)
    folded, shifts = cobot_fold(
        lead.FacT_c, lead.FacT_p, gammas, heads, factors, biases[0] if biases else (), lead.first,
        down=lead.down,
    )  # fmt: skip
    return list(zip(folded, shifts, strict=True)) if lead.down else [(f,) for f in folded]


class CobotForward(EncoderForward[CobotLayer]):
    """Folds for all layers of one encoder during its forward."""

    def make(self) -> list[tuple[Tensor, ...]]:
        return fold(self.layers)

    def together(self) -> bool:
        """True if none is merged and all are alike; RuntimeError if they share no relation."""
        lead = self.layers[0]
        if any(t.FacT_c is not lead.FacT_c or t.FacT_p is not lead.FacT_p for t in self.layers):
            raise RuntimeError(
                "the layers of SAM-COBOT no longer share FacT_c and FacT_p, as after to_empty(); "
                "call load_state_dict on the encoder or the model to tie them again"
            )
        like = [(t.shape, t.dtype, t.device) for t in lead.sources()]
        return all(
            not layer.merged and [(t.shape, t.dtype, t.device) for t in layer.sources()] == like
            for layer in self.layers
        )

    def install(self, encoder: nn.Module) -> None:
        """Register the fold as a hook of the encoder's forward."""
        super().install(encoder)
        encoder.register_load_state_dict_post_hook(self.tie)

    def tie(self, encoder: nn.Module, incompatible: Any) -> None:
        """Share one relation again after ``load_state_dict(assign=True)``, which splits it."""
        lead = self.layers[0]
        for name in ("FacT_c", "FacT_p"):
            kept = getattr(lead, name)
            for layer in self.layers:
                own = getattr(layer, name)
                if own is not kept and not kept.is_meta and not torch.equal(own, kept):
                    raise RuntimeError(
                        f"{name} of layer {layer.first // layer.own} and of layer 0 differ, but "
                        "all layers of SAM-COBOT share one"
                    )
                setattr(layer, name, kept)


class CobotQkvLora(CobotLayer, QkvLora):
    """Packed qkv layer with LoRA on q and v, related across blocks by SAM-COBOT (CVPR 2024).

    x: (..., in_features) -> (..., out_features) = x Wᵀ + b; on q and on v it adds
    ((c_m + γ) ⊙ x Aᵀ) W_m Bᵀ with c_m = (C P)[:, m] for slice m of the model and the quaternion
    matrix W_m of a head, without scaling.

    lora_A: (2·rank, in_features), lora_B: (2·L, rank), L = out_features / 3, q's above v's, each
        Xavier normal, so that the update does not start at zero; with ``zero_start`` B is zeros
    FacT_c (C): (1, rank, S), FacT_p (P): (S, S), shared by all layers of a model; gamma: (2·rank,)
    heads: (2, 4, rank/4, rank/4)

    shared: FacT_c and FacT_p of a model; None gives this layer its own
    index: number of the layer among those that share; its slices are 2·index and 2·index + 1
    The state dict has the published names: linear_a_q.weight, linear_b_q.weight, linear_a_v.weight,
    linear_b_v.weight, gamma, FacT_c, FacT_p, FacT_d1.{r,i,j,k}_weight (q) and FacT_d2 (v).
    Saves for backward what LoRA saves. Raises ValueError if the rank is not a multiple of 4, or if
    the index is outside the relation matrix.
    """

    token_wise = True
    block_watched = False
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
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
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
        """Raise ValueError if layers of these sizes cannot have this update."""
        check_width("rank", rank)
        QkvLora.check_sizes(in_features, out_features, rank)

    @classmethod
    def from_linear(  # type: ignore[override]  # its options differ
        cls,
        linear: nn.Linear,
        rank: int = 4,
        shared: Sequence[nn.Parameter] | None = None,
        index: int = 0,
        zero_start: bool = False,
    ) -> "CobotQkvLora":
        """Add SAM-COBOT to a packed qkv layer; keep its weight and bias Parameters."""
        check_width("rank", rank)
        shared = shared or relation(rank, 2 * (index + 1), linear.weight)
        module = cls._from_linear(
            linear, rank=rank, shared=shared, index=index, zero_start=zero_start
        )
        module.FacT_c, module.FacT_p = shared  # the base class replaced all tensors of the adapter
        return module

    def reset_adapter(self) -> None:
        """Initialise the adapter's parameters anew."""
        for whole in (self.lora_A, self.lora_B):
            for part in whole.chunk(2):
                nn.init.xavier_normal_(part)
        if self.zero_start:
            nn.init.zeros_(self.lora_B)
        if "gamma" in self._parameters:  # the base class calls this before they exist
            self.reset_coefficients()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "FacT_p" in self._parameters:  # nn.Linear calls this before they exist
            nn.init.ones_(self.FacT_c)
            nn.init.eye_(self.FacT_p)
            self.reset_adapter()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.share()[0]

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
