# SPDX-License-Identifier: Apache-2.0
"""AutoGluon's ``ConvLoRALinear``, the Conv-LoRA of its authors (read at 1.6.3).

Classes of that name in other packages are left alone: their forward reaches too much for its code
to be read, so samfast trusts it only where all of it is AutoGluon's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from samfast.adapters.block_layer import foreign_tensor
from samfast.adapters.foreign import Foreign, ForeignModule
from samfast.backends import requested, resolve
from samfast.functional import conv_lora_linear
from samfast.integrations.autogluon_proof import (
    build_problem,
    code_problem,
    experts_of,
    first_of_equals,
    objection,
    tensors_of,
)
from samfast.integrations.linears import takes
from samfast.integrations.swap import patched, swapped
from samfast.kernels._common.autocast import autocast_dtype, autocast_input
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts.conv_lora import part_backend
from samfast.kernels.conv_experts.op import supports as experts_supports
from samfast.kernels.expert_gate.op import supports as gate_supports
from samfast.kernels.lora_linear.op import supports as lora_supports

__all__ = ["CALLS", "OWNER", "FusedConvLora", "kind_of", "mixin_of", "objection", "parameters"]

OWNER = None
CALLS = {
    "keep": "samfast.fuse(model) lets it run fused, and attach takes a model without it",
    "save": "save them with predictor.save(folder) of AutoGluon, or save model.state_dict()",
    "merge": "Conv-LoRA depends on its input, so no weight can hold it",
    "loss": "each layer returns (result, moe_loss); add every moe_loss to the loss yourself",
}


class FusedConvLora(ForeignModule):
    """AutoGluon's linear layer with Conv-LoRA, by samfast's operators.

    x: (N, H, W, in_features), or (N, side², in_features) -> ((…, out_features), moe_loss)

    See ``ConvLoraLinear`` for the formula. The gate's noise is drawn as AutoGluon draws it. Without
    ``lora_dropout`` the same seed gives the same choices. Dropout has the same distribution, but
    other random numbers.
    An expert that no sample chose gets a gradient of zeros, where AutoGluon's gets none.

    It fuses float32, with or without autocast. In every other case AutoGluon's forward runs, and
    ``block_problem`` says why. Every tensor is read at every forward, with one exception: on other
    devices than a CPU, a write to the gate's ``mean`` or ``std`` through ``.data`` goes unnoticed.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (result, moe_loss), by AutoGluon's own forward if it is not fused."""
        windows = _windows(x)
        if windows is None or not takes(x, self.weight) or self.block_problem() is not None:
            return super().forward(x)
        gate: Foreign = self._modules["lora_moe_gating"]
        ratios: list[int] = self.upsample_ratios
        count, first = len(ratios), first_of_equals(len(ratios), x.device)
        experts = experts_of(self)
        experts, ratios = experts[first:] + experts[:first], ratios[first:] + ratios[:first]
        noise = None
        if gate.training:
            dtype = autocast_dtype(x.device.type) or x.dtype
            noise = torch.randn(windows.samples, count, dtype=dtype, device=x.device)
            noise = noise.roll(-first, 1)
        dropout = self.lora_dropout
        active = isinstance(dropout, nn.Dropout) and dropout.training
        y, loss = conv_lora_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B,
            torch.stack([conv.weight for conv in experts]),
            torch.stack([conv.bias for conv in experts]),
            gate.w_gate.roll(-first, 1), gate.w_noise.roll(-first, 1), self.scaling, ratios,
            windows=windows, noise=noise, dropout=float(dropout.p) if active else 0.0,
        )  # fmt: skip
        return y, loss.float()

    def block_problem(self) -> str | None:
        """Say why AutoGluon's own forward runs; None if this class's does."""
        if (method := patched(self)) is not None:
            return f"has another {method} than its class had; undo that to fuse it"
        return build_problem(self) or code_problem(self) or _now_problem(self)

    def backends(self) -> dict[str, str]:
        """Map each operation to the backend that a forward would choose now, under autocast too."""
        if self.block_problem() is not None:
            return {}
        x = autocast_input(self.weight.detach()[:0])
        h = x.new_empty(0, self.lora_A.shape[0])
        gate, kernel = self.lora_moe_gating.w_gate, experts_of(self)[0].weight[None]
        supported = {
            "lora_linear": lambda b: lora_supports(b, x, self.lora_A, self.lora_B),
            "conv_experts": lambda b: experts_supports(b, h, kernel),
            "expert_gate": lambda b: gate_supports(b, h, gate),
        }
        found = {}
        for name, supports in supported.items():
            try:
                asked = part_backend(name, requested("auto"))
                found[name] = resolve(name, asked, x.device, supports)
            except RuntimeError as error:
                found[name] = str(error)
        return found


def _windows(x: Tensor) -> Windows | None:
    """Return each map of x as a window; None if AutoGluon's forward may have to fail."""
    if 0 in x.shape:
        return None
    if x.dim() == 4:
        return Windows.whole(*x.shape[:3])
    if x.dim() != 3:
        return None
    side = int(x.shape[1] ** 0.5 + 0.5)  # not isqrt, which torch.compile cannot trace
    return Windows.whole(x.shape[0], side, side) if side * side == x.shape[1] else None


def _now_problem(module: Foreign) -> str | None:
    """Say which tensor prevents fusing now."""
    narrow = autocast_dtype(module.weight.device.type)
    for name, tensor in tensors_of(module).items():
        if foreign_tensor(tensor):
            return f"has a weight in {name} that is a {type(tensor).__name__}"
        base = name in ("weight", "bias") and narrow is not None and tensor.dtype.itemsize < 8
        if tensor.dtype != torch.float32 and not base:
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"has a {name} of {kind}, while AutoGluon's forward takes float32"
    return None


def mixin_of(module: nn.Module) -> type:
    """Return the mixin for a layer of AutoGluon's."""
    return FusedConvLora


def kind_of(module: nn.Module) -> str:
    """Return what sentences call the module."""
    made_of = swapped(module)
    return (type(module) if made_of is None else made_of.stock).__name__


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all but the frozen layer's."""
    for name, parameter in module.named_parameters():
        if name not in ("weight", "bias"):
            yield name, parameter
