# SPDX-License-Identifier: Apache-2.0
"""Conv-LoRA on a whole linear layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from samfast.adapters.adapted_linear import AdaptedLinear, plain_linear
from samfast.adapters.block_layer import BlockLayer, dropout_seed
from samfast.adapters.checks import check_alpha, check_dropout, check_linear_rank
from samfast.adapters.latest_loss import LatestLoss, recomputing
from samfast.adapters.published import Published, PublishedNames
from samfast.backends import requested, resolve
from samfast.kernels._common.autocast import autocast_input
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts.conv_lora import (
    COEFFICIENT,
    conv_lora_linear,
    middle_key,
    part_backend,
)
from samfast.kernels.conv_experts.op import MAX_RATIO
from samfast.kernels.conv_experts.op import check_experts as check_kernels
from samfast.kernels.conv_experts.op import supports as experts_supports
from samfast.kernels.expert_gate.op import check_gate, draw_noise
from samfast.kernels.expert_gate.op import supports as gate_supports
from samfast.kernels.lora_linear.op import supports as lora_supports
from samfast.kernels.sam_block.plan import LayerPlan
from samfast.methods.conv_lora.checks import check_choice, check_depthwise, check_experts
from samfast.methods.conv_lora.dense import DenseConvLora, windows_of

_GATE = "lora_moe_gating."
_CONSTANTS = {f"{_GATE}mean": 0.0, f"{_GATE}std": 1.0}  # of the gate's noise
_RENAMED = {"w_gate": f"{_GATE}w_gate", "w_noise": f"{_GATE}w_noise"}
_PACKED = {"expert_weight": "weight", "expert_bias": "bias"}


def checked_ratios(ratios: Sequence[int] | None, experts: int) -> tuple[int, ...]:
    """Return the experts' ratios, 1, 2, … if None; raise ValueError if they do not fit."""
    if ratios is None:
        return tuple(range(1, experts + 1))
    if not isinstance(ratios, (tuple, list)) or len(ratios) != experts:
        raise ValueError(f"ratios is {ratios!r}; it must have one entry for each of {experts}")
    for ratio in ratios:
        whole = isinstance(ratio, int) and not isinstance(ratio, bool)
        if not whole or not 1 <= ratio <= MAX_RATIO:
            raise ValueError(
                f"ratios has {ratio!r}; each must be a whole number from 1 to {MAX_RATIO}"
            )
    return tuple(ratios)


class ConvLoraLinear(PublishedNames, AdaptedLinear):
    """Linear layer with a routed convolution in its low-rank update (Conv-LoRA, ICLR 2024).

    x: (N, H, W, in_features), or (N, H·W, in_features) -> (…, out_features)
    y = x Wᵀ + b + alpha/rank · (h + E(h)) Bᵀ with h = drop(x) Aᵀ as N maps of H × W. A gate picks
    one expert E for each map. E enlarges the map by the expert's ratio, convolves it 3 × 3, applies
    GELU and shrinks it back.

    lora_A: (rank, in_features), Kaiming uniform   lora_B: (out_features, rank), zeros
    expert_weight: (experts, rank, rank, 3, 3), or (experts, rank, 1, 3, 3) when depthwise, each
        expert as nn.Conv2d starts   expert_bias: (experts, rank), zeros
    w_gate, w_noise: (rank, experts), zeros

    All are float32, or float64 with a float64 weight. The state dict has the published names:
    lora_moe_experts.{i}.0.weight and .bias, lora_moe_gating.w_gate, w_noise, mean and std.

    ratios: enlargement by each expert (default: 1, 2, …)
    top_k: experts per map, weighted by their gate values
    formula: "code", or "paper" for the paper's Σ gate · conv without skip and GELU
    Other values of top_k and formula than the defaults run on plain autograd.
    """

    window_wise = True
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    expert_weight: nn.Parameter
    expert_bias: nn.Parameter
    w_gate: nn.Parameter
    w_noise: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 3,
        alpha: float | None = 32,
        experts: int = 8,
        *,
        ratios: Sequence[int] | None = None,
        depthwise: bool = False,
        dropout: float = 0.0,
        top_k: int = 1,
        formula: str = "code",
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ):
        self.check_sizes(in_features, out_features, rank)
        check_alpha(alpha)
        check_experts(experts)
        checked = checked_ratios(ratios, experts)
        check_depthwise(depthwise)
        check_dropout(dropout)
        check_choice(top_k, experts, formula)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.rank = rank
        self.alpha = rank if alpha is None else alpha
        self.experts = experts
        self.ratios = checked
        self.depthwise = depthwise
        self.dropout = dropout
        self.top_k = top_k
        self.formula = formula
        self.add_adapter(
            lora_A=(rank, in_features),
            lora_B=(out_features, rank),
            expert_weight=(experts, rank, 1 if depthwise else rank, 3, 3),
            expert_bias=(experts, rank),
            w_gate=(rank, experts),
            w_noise=(rank, experts),
        )
        self._latest = LatestLoss()
        self.reset_adapter()

    check_sizes = staticmethod(check_linear_rank)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 3,
        alpha: float | None = 32,
        experts: int = 8,
        *,
        ratios: Sequence[int] | None = None,
        depthwise: bool = False,
        dropout: float = 0.0,
        top_k: int = 1,
        formula: str = "code",
    ) -> "ConvLoraLinear":
        """Add Conv-LoRA to ``linear``; keep its weight and bias Parameters."""
        return cls._from_linear(
            linear,
            rank=rank,
            alpha=alpha,
            experts=experts,
            ratios=ratios,
            depthwise=depthwise,
            dropout=dropout,
            top_k=top_k,
            formula=formula,
        )

    @property
    def scaling(self) -> float:
        """The factor of the update: alpha / rank."""
        return self.alpha / self.rank

    def reset_adapter(self) -> None:
        """Initialise the adapter's parameters anew."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        for kernel in self.expert_weight:
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        for zeros in (self.expert_bias, self.w_gate, self.w_noise):
            nn.init.zeros_(zeros)

    @overload
    def forward(
        self,
        x: Tensor,
        size: tuple[int, int] | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        expert_index: Tensor | None = None,
        return_aux: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        size: tuple[int, int] | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        expert_index: Tensor | None = None,
        return_aux: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        size: tuple[int, int] | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        expert_index: Tensor | None = None,
        return_aux: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, or (y, balancing loss) with ``return_aux``. ``samfast.aux_loss`` reads it too.

        size: (H, W) of the maps, if x is (N, H·W, in_features) and they are not square
        noise: (N, experts), standard normal noise of the gate in training (default: drawn on x's
            device, with ``generator`` if there is one)
        expert_index: (N,) int64, the experts to use instead of the gate's choice

        Raises ValueError if x has another shape, or if noise is given outside training.
        """
        if generator is not None and recomputing():
            raise RuntimeError(
                "a checkpoint reruns this forward, but its generator has moved on; draw the noise "
                "beforehand and pass it as noise="
            )
        windows = windows_of(x, size)
        if self.training and noise is None:
            noise = draw_noise(x, windows.samples, self.experts, generator)
        elif noise is not None and not self.training:
            raise ValueError("noise is given, but the gate uses noise only in training")
        y, _, aux = self._run(x, windows, noise, expert_index)
        return (y, aux) if return_aux else y

    def forward_windows(self, x: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer on windows of images, without copying them out: y, pad_h and pad_b.

        x: (B, H, W, in_features) -> y: (B, H, W, out_features)
        Gate and experts see window × window maps, padded with zeros at the bottom and right. The
        rows of y for the padding are bias + pad_h pad_bᵀ, with pad_h (B · pads, rank), image by
        image and line by line, and pad_b (out_features, rank).
        """
        images, height, width = x.shape[:3]
        windows = Windows(images, height, width, window, window)
        noise = None
        if self.training:
            noise = draw_noise(x, windows.samples, self.experts, None)
        y, z_pad, _ = self._run(x, windows, noise, None)
        return y, z_pad, self.scaling * self.lora_B

    def block_problem(self) -> str | None:
        """Say why this layer cannot take part in a fused block; None if it can."""
        if self.top_k > 1 or self.formula != "code":
            return f"has top_k={self.top_k} and formula={self.formula!r}, for the reference only"
        return None

    def block_layer(self, x: Tensor, windows: Windows) -> BlockLayer:
        """Return what the layer passes to a fused block; x is the input of the products."""
        dropout = float(self.dropout) if self.training else 0.0
        params: list[Tensor] = [self.expert_weight, self.expert_bias, self.w_gate, self.w_noise]
        rank, groups = self.lora_A.shape[0], self.rank if self.depthwise else 1
        check_kernels(rank, self.expert_weight, self.expert_bias, self.ratios, groups)
        noise = draw_noise(x, windows.samples, self.experts, None) if self.training else None
        check_gate(windows.samples, rank, self.w_gate, self.w_noise, noise, None)
        if noise is not None:
            params.append(noise)
        plan = LayerPlan(
            adapted=True,
            scaling=float(self.scaling),
            dropout=dropout,
            middle=middle_key(self.ratios, COEFFICIENT, requested("auto")),
            flags=(int(self.training), 0),
            params=len(params),
        )
        seed = dropout_seed(dropout, x)
        factors = (self.weight, self.bias, self.lora_A, self.lora_B)
        return BlockLayer(*factors, plan, seed, tuple(params), self._keep)

    def _keep(self, aux: Tensor, y: Tensor) -> Tensor:
        trained = (self.lora_A, self.w_gate, self.w_noise)
        return self._latest.keep(aux, y, self.training, any(p.requires_grad for p in trained))

    def _run(
        self, x: Tensor, windows: Windows, noise: Tensor | None, expert_index: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, z_pad and the balancing loss; keep the loss for ``samfast.aux_loss``."""
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace and torch.onnx.export would fix the experts that the example "
                "chose; pass them samfast.export_form(model), where all experts run"
            )
        y, aux, z_pad = conv_lora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.expert_weight,
            self.expert_bias,
            self.w_gate,
            self.w_noise,
            self.scaling,
            self.ratios,
            windows=windows,
            noise=noise,
            expert_index=expert_index,
            dropout=self.dropout if self.training else 0.0,
            top_k=self.top_k,
            formula=self.formula,
            return_pads=True,
        )
        return self._keep(aux, y), z_pad, aux

    def plain(self) -> DenseConvLora:
        tensors = (self.lora_A, self.lora_B, self.expert_weight, self.expert_bias, self.w_gate)
        return DenseConvLora(
            plain_linear(self.weight, self.bias), *tensors, scaling=self.scaling,
            ratios=self.ratios, top_k=self.top_k, formula=self.formula,
        )  # fmt: skip

    def latest_loss(self) -> LatestLoss:
        return self._latest

    def biases(self) -> Iterator[nn.Parameter]:
        yield self.expert_bias

    def adapter_state(self) -> Iterator[tuple[str, Tensor]]:
        return self.published_state()

    def constants(self) -> dict[str, float]:
        return _CONSTANTS

    def state_problem(self, state: Mapping[str, Tensor]) -> str | None:
        for name, value in _CONSTANTS.items():
            given = state.get(name)
            if given is not None and not given.is_meta and not bool((given == value).all()):
                return f"{name} is {given.tolist()}, but the gate's noise is standard normal"
        return None

    def published(self) -> Published:
        names: Published = {
            name: ([key], self.get_parameter(name).shape) for name, key in _RENAMED.items()
        }
        for name, leaf in _PACKED.items():
            keys = [f"lora_moe_experts.{i}.0.{leaf}" for i in range(self.experts)]
            names[name] = keys, self.get_parameter(name).shape[1:]
        return names

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        operations = ("lora_linear", "conv_experts", "expert_gate")
        asked = requested("auto")
        if self.top_k > 1 or self.formula != "code":
            if asked in ("auto", "reference"):
                return dict.fromkeys(operations, "reference")
            only = f"top_k={self.top_k} with formula={self.formula!r} runs on the reference only"
            return dict.fromkeys(operations, only)
        x = autocast_input(self.weight.detach()[:0])
        h = x.new_empty(0, self.rank)
        supported = {
            "lora_linear": lambda b: lora_supports(b, x, self.lora_A, self.lora_B),
            "conv_experts": lambda b: experts_supports(b, h, self.expert_weight),
            "expert_gate": lambda b: gate_supports(b, h, self.w_gate),
        }
        found = {}
        for name, supports in supported.items():
            backend = part_backend(name, asked)
            try:
                found[name] = resolve(name, backend, x.device, supports)
            except RuntimeError as error:
                found[name] = str(error)
        return found

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"
        text += f", experts={self.experts}"
        if self.ratios != checked_ratios(None, self.experts):
            text += f", ratios={self.ratios}"
        for name, default in (
            ("depthwise", False),
            ("dropout", 0.0),
            ("top_k", 1),
            ("formula", "code"),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text
