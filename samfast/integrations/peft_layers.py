# SPDX-License-Identifier: Apache-2.0
"""PEFT's ``lora.Linear``, alone or in a fused block (PEFT 0.15 to 0.21)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from samfast.adapters.block_layer import BlockLayer, dropout_seed
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
    "keep": "samfast.fuse(model) lets it run fused, and PEFT's model.unload() takes it off",
    "save": "save them with PEFT's model.save_pretrained(folder)",
    "merge": (
        "fold them in with PEFT's model.merge_and_unload(), or with merge_adapter() and out with "
        "unmerge_adapter()"
    ),
    "loss": "they add nothing to the loss, so leave aux_loss out",
}
_NARROW = (torch.float16, torch.bfloat16)


class FusedLoraLinear:
    """PEFT's linear layer with LoRA, by samfast's operators.

    x: (..., in_features) -> (..., out_features) = x Wᵀ + b + scaling · drop(x) Aᵀ Bᵀ

    It fuses one active adapter of plain LoRA on a plain ``nn.Linear``. A merged or disabled adapter
    makes it that linear layer. In every other case PEFT's own forward runs, and ``block_problem``
    says why. What PEFT keeps is read at every forward, so its calls work as before.

    Dropout has the same distribution as PEFT's, but other random numbers: samfast draws a seed and
    keeps no mask. In eval, and with a probability of 0, there is no difference.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        name, problem = self._adapter()
        if args or kwargs or name is None or problem is not None or not self._takes(x):
            return super().forward(x, *args, **kwargs)
        base, scaling, dropout = self.base_layer, self.scaling[name], self._dropout(name)
        return lora_linear(
            x, base.weight, base.bias, *self._factors(name), scaling, dropout=dropout
        )

    @property
    def token_wise(self) -> bool:
        """Whether every token is treated alone, and a token of zeros gives the bias."""
        return self.block_problem() is None

    def block_problem(self) -> str | None:
        """Why PEFT's own forward runs, None where the layer can take part in a fused block."""
        return self._adapter()[1]

    def block_layer(self, x: Tensor, windows: Windows) -> BlockLayer:
        """Its share in a fused block; x as the block's products take it."""
        base, (name, _) = self.base_layer, self._adapter()
        if name is None:
            return BlockLayer(base.weight, base.bias)
        dropout = self._dropout(name)
        plan = LayerPlan(adapted=True, scaling=float(self.scaling[name]), dropout=dropout)
        seed = dropout_seed(dropout, x)
        return BlockLayer(base.weight, base.bias, *self._factors(name), plan, seed)

    def backends(self) -> dict[str, str]:
        """What a forward would choose here and now, for an x as autocast would have it."""
        name, problem = self._adapter()
        if name is None or problem is not None:
            return {}
        return backend_of(self.base_layer.weight, self._factors(name))

    def _adapter(self) -> tuple[str | None, str | None]:
        """The active adapter, None for a plain linear layer; and why PEFT's own forward runs."""
        if patched(self):
            return None, "has a class with a forward that was replaced"
        base = self.base_layer
        if type(base) is not nn.Linear:
            return None, f"is over {phrase(base)}, not a plain nn.Linear"
        if _quantised(base.weight):
            return None, f"has a weight that is a {type(base.weight).__name__}"
        if altered(base):
            return None, "has hooks or a forward of its own on its base layer"
        if self.disable_adapters:
            merged = "is disabled while it is merged, so PEFT unmerges it at its next forward"
            return None, merged if self.merged else None
        if self.merged:
            return None, None
        down = self.lora_A
        active = [name for name in self.active_adapters if name in down]
        if len(active) != 1:
            return None, f"has {len(active)} active adapters" if active else None
        return active[0], self._problem(active[0])

    def _problem(self, name: str) -> str | None:
        """What is not plain in an adapter."""
        if self.use_dora.get(name, False):
            return "has a variant of LoRA, DoRA"
        variant = getattr(self, "lora_variant", {}).get(name)  # PEFT 0.15 has none
        if variant is not None:
            return f"has a variant of LoRA, {type(variant).__name__}"
        if self.fan_in_fan_out:
            return "has a transposed weight (fan_in_fan_out)"
        down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return "has factors that are not plain nn.Linear"
        if up.bias is not None or down.bias is not None:
            return "has a bias in its adapter"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"has {phrase(dropout)} before its adapter"
        if altered(down) or altered(up) or altered(dropout):
            return "has hooks or a forward of its own in its adapter"
        if self._dropout(name) >= 1.0:
            return f"has a dropout of {dropout.p}"
        if not isinstance(self.scaling[name], (int, float)):
            return f"has a scaling that is a {type(self.scaling[name]).__name__}, not a number"
        if not getattr(self, "cast_input_dtype_enabled", True):
            return "does not cast its input to its adapter's dtype"
        return _dtype_problem(self.base_layer.weight.dtype, down.weight.dtype, up.weight.dtype)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight

    def _dropout(self, name: str) -> float:
        """The probability that acts now."""
        dropout = self.lora_dropout[name]
        return float(dropout.p) if type(dropout) is nn.Dropout and dropout.training else 0.0

    def _takes(self, x: Tensor) -> bool:
        """Whether x has the weight's dtype; PEFT says what is wrong with another."""
        return x.dtype == self.base_layer.weight.dtype or autocast_dtype(x.device.type) is not None


def _quantised(weight: Tensor) -> bool:
    """Whether it is no plain tensor; what FSDP shards is one by the time of the forward."""
    return is_traceable_wrapper_subclass(weight) and type(weight).__name__ != "DTensor"


def _dtype_problem(base: torch.dtype, down: torch.dtype, up: torch.dtype) -> str | None:
    """Factors are of the base's dtype, or float32 over a narrow base."""
    if down == up and (down == base or (down == torch.float32 and base in _NARROW)):
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in (down, up, base)]
    return f"has factors of {names[0]} and {names[1]} over a weight of {names[2]}"


def mixin_of(module: nn.Module) -> type:
    return FusedLoraLinear


def kind_of(module: nn.Module) -> str:
    """Such as lora.Linear: the method and the class."""
    made_of = swapped(module)
    kind = type(module) if made_of is None else made_of.stock
    tuners, _, rest = kind.__module__.partition("peft.tuners.")
    return f"{rest.partition('.')[0]}.{kind.__name__}" if rest and not tuners else kind.__name__


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Of all its adapters, active or not."""
    for name, parameter in module.named_parameters():
        if name.partition(".")[0] in module.adapter_layer_names:
            yield name, parameter
