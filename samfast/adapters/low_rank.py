# SPDX-License-Identifier: Apache-2.0
"""The linear layer under every mergeable low-rank adapter: shared weight, merging, state dict."""

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
    """nn.Linear plus trainable tensors of low rank that can be folded into the weight and out.

    A subclass adds lora_A and lora_B with ``add_adapter``, or others from which ``factors`` makes
    them, fills them in ``reset_adapter``, gives what they add to the weight in ``delta_weight`` and
    its forward in ``forward_adapted``.

    The state dict always holds the weight without the adapter, merged or not, and loading one
    while merged merges again: a merged model and an unmerged one save the same tensors.
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
        # The weight's own storage while another one with the adapter folded in stands in for it.
        self.register_buffer("unmerged_weight", None, persistent=False)

    def delta_weight(self) -> torch.Tensor:
        """(out_features, in_features), at least float32: what the adapter adds to the weight."""
        raise NotImplementedError

    def forward_adapted(self, x: torch.Tensor) -> torch.Tensor:
        """The result with the update. x: (..., in_features) -> (..., out_features)"""
        raise NotImplementedError

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_a and lora_b as the engine takes them, differentiable in the adapter's tensors."""
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
        """Why this layer cannot take part in a fused block, None when it can."""
        if self.merged and self.training and torch.is_grad_enabled():
            return "has its adapter merged, which cannot be trained"  # its own forward raises
        return None

    def block_layer(self, x: torch.Tensor, windows: Windows) -> BlockLayer:
        """Its share in a fused block; x as the block's products take it."""
        if self.merged:
            return BlockLayer(self.weight, self.bias)
        dropout = self.dropout if self.training else 0.0
        return BlockLayer(
            self.weight, self.bias, *self.factors(), self.layer_plan(dropout),
            dropout_seed(dropout, x),
        )  # fmt: skip

    def layer_plan(self, dropout: float) -> LayerPlan:
        """What a fused block has to know of the update beside its tensors."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def backends(self) -> dict[str, str]:
        """What a forward would choose here and now, for an x as autocast would have it."""
        with torch.no_grad():
            factors = self.factors()
        return backend_of(self.weight, factors, len(getattr(self, "slices", ())) or 1)

    @torch.inference_mode(False)  # a later backward saves the merged weight
    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapter into the weight. Merging again folds the present adapter anew.

        Autocast has no say in it: a merged weight is the same whatever is on around the call.
        """
        kept = self.weight.data if self.unmerged_weight is None else self.unmerged_weight
        merged = self._folded(kept)
        self.unmerged_weight = kept
        self.weight.data = merged

    def _folded(self, weight: torch.Tensor) -> torch.Tensor:
        """A new tensor: the weight with the present adapter added."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        with without_autocast(weight.device.type):
            return (weight.to(wide) + self.delta_weight().to(wide)).to(weight.dtype)

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """nn.Linear with the adapter in its weight."""
        weight = self.weight.data if self.merged else self._folded(self.weight.data)
        return plain_linear(weight, self.bias)

    def unmerge(self) -> None:
        """Put the weight's own storage back, bit for bit. Does nothing when it is not merged."""
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
    """What runs ``lora_linear`` on these, for an x as autocast would have it."""
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
