# SPDX-License-Identifier: Apache-2.0
"""Base class of mergeable low-rank adapters: shared weight, merging, state dict."""

from typing import Any

import torch
from torch import nn

from samfast.adapters.adapted_linear import AdaptedLinear, plain_linear
from samfast.adapters.block_layer import BlockLayer, dropout_seed
from samfast.backends import requested, resolve
from samfast.kernels._common.autocast import autocast_input, without_autocast
from samfast.kernels._common.windows import Windows
from samfast.kernels.lora_linear.op import supports
from samfast.kernels.sam_block.plan import LayerPlan


class LowRankLinear(AdaptedLinear):
    """nn.Linear plus trainable low-rank tensors that can be merged into the weight and removed.

    A subclass adds lora_A and lora_B with ``add_adapter``, or other tensors from which ``factors``
    computes them. ``reset_adapter`` initialises them. ``delta_weight`` returns what they add to the
    weight, and ``forward_adapted`` is the subclass's forward.

    The state dict always holds the weight without the adapter, merged or not. Loading one while
    merged merges again. A merged and an unmerged model thus save the same tensors.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    dropout: float
    unmerged_weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        # The original storage of the weight, while a merged one replaces it.
        self.register_buffer("unmerged_weight", None, persistent=False)

    def delta_weight(self) -> torch.Tensor:
        """What the adapter adds to the weight: (out_features, in_features), at least float32."""
        raise NotImplementedError

    def forward_adapted(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer with its update. x: (..., in_features) -> (..., out_features)"""
        raise NotImplementedError

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return lora_a and lora_b for the kernel, differentiable in the adapter's tensors."""
        return self.lora_A, self.lora_B

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.unmerged_weight is None:
            return self.forward_adapted(x)
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "a merged adapter cannot be trained; call unmerge() first, or eval() to predict"
            )
        return super().forward(x)

    def block_problem(self) -> str | None:
        """Say why this layer cannot take part in a fused block; None if it can."""
        if self.merged and self.training and torch.is_grad_enabled():
            return "has its adapter merged, which cannot be trained"  # its forward raises
        return None

    def block_layer(self, x: torch.Tensor, windows: Windows) -> BlockLayer:
        """Return what the layer passes to a fused block; x is the input of the products."""
        if self.merged:
            return BlockLayer(self.weight, self.bias)
        dropout = self.dropout if self.training else 0.0
        return BlockLayer(
            self.weight, self.bias, *self.factors(), self.layer_plan(dropout),
            dropout_seed(dropout, x),
        )  # fmt: skip

    def layer_plan(self, dropout: float) -> LayerPlan:
        """What a fused block needs to know about the update in addition to its tensors."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        with torch.no_grad():
            factors = self.factors()
        return backend_of(self.weight, factors, len(getattr(self, "slices", ())) or 1)

    @torch.inference_mode(False)  # a later backward saves the merged weight
    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapter into the weight. Merging again folds the adapter's present values.

        Autocast does not affect the merged weight.
        """
        kept = self.weight.data if self.unmerged_weight is None else self.unmerged_weight
        merged = self._folded(kept)
        self.unmerged_weight = kept
        self.weight.data = merged

    def _folded(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a new tensor: the weight plus the present adapter."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        with without_autocast(weight.device.type):
            return (weight.to(wide) + self.delta_weight().to(wide)).to(weight.dtype)

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """Return an nn.Linear with the adapter in its weight."""
        weight = self.weight.data if self.merged else self._folded(self.weight.data)
        return plain_linear(weight, self.bias)

    def unmerge(self) -> None:
        """Restore the original weight, bit for bit. Do nothing if it is not merged."""
        if self.unmerged_weight is not None:
            self.weight.data = self.unmerged_weight
            self.unmerged_weight = None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.unmerged_weight is not None:
            destination[f"{prefix}weight"] = self.unmerged_weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()


def backend_of(
    weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], slices: int = 1
) -> dict[str, str]:
    """Return the backend that runs ``lora_linear`` on these tensors, under autocast too."""
    x = autocast_input(weight.detach()[:0])
    try:
        name = resolve(
            "lora_linear",
            requested("auto"),
            x.device,
            lambda backend: supports(backend, x, *factors, slices),
        )
    except RuntimeError as error:
        return {"lora_linear": str(error)}
    return {"lora_linear": name}
