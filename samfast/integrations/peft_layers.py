# SPDX-License-Identifier: Apache-2.0
"""PEFT's ``lora.Linear``, on its own or in a fused block (tested with PEFT 0.15 to 0.21)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from samfast.adapters.block_layer import BlockLayer, dropout_seed, foreign_tensor
from samfast.adapters.foreign import Foreign, ForeignModule
from samfast.adapters.low_rank import backend_of
from samfast.adapters.stand_in import altered
from samfast.adapters.stand_in import kind_of as phrase
from samfast.functional import lora_linear
from samfast.integrations.peft_proof import objection
from samfast.integrations.swap import patched, swapped
from samfast.kernels._common.autocast import autocast_dtype
from samfast.kernels._common.windows import Windows
from samfast.kernels.sam_block.plan import LayerPlan

__all__ = ["CALLS", "OWNER", "FusedLoraLinear", "kind_of", "mixin_of", "objection", "parameters"]

OWNER = "PEFT"
CALLS = {
    "keep": "samfast.fuse(model) fuses it, and PEFT's model.unload() removes it",
    "save": "save them with PEFT's model.save_pretrained(folder)",
    "merge": (
        "fold them in with PEFT's model.merge_and_unload(), or with merge_adapter() and out with "
        "unmerge_adapter()"
    ),
    "loss": "they add nothing to the loss, so leave aux_loss out",
}
_MERGE = "to predict fused, call merge_adapter()"
_PARTS = ("lora_A", "lora_B", "lora_dropout")  # of one adapter
_NARROW = (torch.float16, torch.bfloat16)


class FusedLoraLinear(ForeignModule):
    """PEFT's linear layer with LoRA, by samfast's operators.

    x: (..., in_features) -> (..., out_features) = x Wᵀ + b + scaling · drop(x) Aᵀ Bᵀ

    It fuses one active plain LoRA adapter on a plain ``nn.Linear``. If the adapter is merged or
    disabled, it runs that linear layer. Otherwise PEFT's own forward runs, and ``block_problem``
    says why. Every forward reads PEFT's state anew, so PEFT's calls work as before.

    Dropout has PEFT's distribution but other random numbers: samfast draws a seed and keeps no
    mask. In eval, and with a probability of 0, results agree.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run x: (..., in_features) -> (..., out_features); by PEFT's own forward if not fused."""
        active = self._active()
        theirs = args or kwargs or not active or not self._takes(x)
        if theirs or self.block_problem() is not None:
            return super().forward(x, *args, **kwargs)
        weight, bias, lora_a, lora_b = self._tensors(active[0])
        scaling, dropout = self.scaling[active[0]], self._dropout(active[0])
        return lora_linear(x, weight, bias, lora_a, lora_b, scaling, dropout=dropout)

    @property
    def token_wise(self) -> bool:
        """True if each token is processed on its own and a token of zeros gives the bias."""
        return self.block_problem() is None

    def block_problem(self) -> str | None:
        """Say why PEFT's own forward runs; None if the layer can take part in a fused block."""
        if (method := patched(self)) is not None:
            return f"has another {method} than its class had; undo that to fuse it"
        base: Foreign = self._modules["base_layer"]
        if type(base) is not nn.Linear:
            return f"is over {phrase(base)}, not a plain nn.Linear"
        if foreign_tensor(base.weight):
            return f"has a weight that is a {type(base.weight).__name__}"
        if altered(base):
            return "has hooks or a forward of its own on its base layer; remove them to fuse it"
        if self.disable_adapters and self.merged:
            return "is disabled while it is merged, so PEFT unmerges it at its next forward"
        active = self._active()
        if len(active) > 1:
            return f"has {len(active)} active adapters; set_adapter(name) leaves one"
        return self._problem(active[0]) if active else None

    def block_layer(self, x: Tensor, windows: Windows) -> BlockLayer:
        """Return what the layer passes to a fused block; x is the input of the products."""
        active = self._active()
        if not active:
            return BlockLayer(self.weight, self.bias)
        dropout = self._dropout(active[0])
        plan = LayerPlan(adapted=True, scaling=float(self.scaling[active[0]]), dropout=dropout)
        return BlockLayer(*self._tensors(active[0]), plan, dropout_seed(dropout, x))

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        active = self._active()
        if not active or self.block_problem() is not None:
            return {}
        weight, _, lora_a, lora_b = self._tensors(active[0])
        return backend_of(weight, (lora_a, lora_b))

    def _active(self) -> list[str]:
        """Return the adapters that act now; without any, the layer is a plain linear one."""
        if self.disable_adapters or self.merged:
            return []
        factors: Foreign = self._modules["lora_A"]
        return [name for name in self.active_adapters if name in factors._modules]

    def _problem(self, name: str) -> str | None:
        """Say what is not plain in an adapter."""
        if self.use_dora.get(name, False):
            return f"has a variant of LoRA, DoRA; {_MERGE}"
        variant = getattr(self, "lora_variant", {}).get(name)  # PEFT 0.15 has none
        if variant is not None:
            return f"has a variant of LoRA, {type(variant).__name__}"
        if self.fan_in_fan_out:
            return "has a transposed weight (fan_in_fan_out)"
        parts: dict[str, Foreign] = self._modules
        down, up, dropout = (parts[part]._modules[name] for part in _PARTS)
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return "has factors that are not plain nn.Linear"
        if up.bias is not None or down.bias is not None:
            return f"has a bias in its adapter; {_MERGE}"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"has {phrase(dropout)} before its adapter"
        if altered(down) or altered(up) or altered(dropout):
            return "has hooks or a forward of its own in its adapter; remove them to fuse it"
        if type(dropout) is nn.Dropout and dropout.p >= 1.0:
            return f"has a dropout of {dropout.p}"
        if not isinstance(self.scaling[name], (int, float)):
            return f"has a scaling that is a {type(self.scaling[name]).__name__}, not a number"
        if not getattr(self, "cast_input_dtype_enabled", True):
            return "does not cast its input to its adapter's dtype; enable that to fuse it"
        return _dtype_problem(self.base_layer.weight.dtype, down.weight.dtype, up.weight.dtype)

    def _tensors(self, name: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return weight, bias, lora_a and lora_b."""
        base: Foreign = self._modules["base_layer"]
        parts: dict[str, Foreign] = self._modules
        down, up = (parts[part]._modules[name] for part in _PARTS[:2])
        return base.weight, base.bias, down.weight, up.weight

    def _dropout(self, name: str) -> float:
        """Return the dropout probability that acts now."""
        dropout = self.lora_dropout[name]
        return float(dropout.p) if type(dropout) is nn.Dropout and dropout.training else 0.0

    def _takes(self, x: Tensor) -> bool:
        """True if x has the weight's dtype; for others PEFT raises the error."""
        return x.dtype == self.weight.dtype or autocast_dtype(x.device.type) is not None


def _dtype_problem(base: torch.dtype, down: torch.dtype, up: torch.dtype) -> str | None:
    """Say if factors have neither the base's dtype nor float32 over a narrower base."""
    if down == up and (down == base or (down == torch.float32 and base in _NARROW)):
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in (down, up, base)]
    return (
        f"has factors of {names[0]} and {names[1]} over a weight of {names[2]}; cast them to "
        f"{names[2]} to fuse it"
    )


def mixin_of(module: nn.Module) -> type:
    """Return the mixin for a PEFT layer."""
    return FusedLoraLinear


def kind_of(module: Foreign) -> str:
    """Return method and class, such as lora.Linear."""
    made_of = swapped(module)
    kind = type(module) if made_of is None else made_of.stock
    tuners, _, rest = kind.__module__.partition("peft.tuners.")
    return f"{rest.partition('.')[0]}.{kind.__name__}" if rest and not tuners else kind.__name__


def parameters(module: Foreign) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what all its adapters add, active or not."""
    for name, parameter in module.named_parameters():
        if name.partition(".")[0] in module.adapter_layer_names:
            yield name, parameter
