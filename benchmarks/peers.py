# SPDX-License-Identifier: Apache-2.0
"""What others train SAM with: stock blocks, eager adapters, PEFT's, other attentions.

All share the Parameters of the module they are made from; only modules are copied.
"""

import copy
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import attention
from samfast.functional import conv_lora_linear
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.kernels._common.windows import Windows
from samfast.methods.conv_lora.layer import ConvLoraLinear
from samfast.methods.lora.layer import LoraLinear

# Whose errors make the budget: rounding differs along the many layers of a block.
STOCK = {"eager", "SDPA + mask, PEFT", "augmented SDPA"}
# segment_anything's attention takes its tables at places that are made on the CPU at every call:
# a copy that waits, which ends a graph's capture and leaves the allocator in the middle of it.
INDEXED_BY_HOST = {"eager"}


class EagerLora(nn.Module):
    """LoRA as most write it: two more linear layers and an addition."""

    def __init__(self, layer: LoraLinear):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B, self.scaling = layer.lora_A, layer.lora_B, layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.scaling * update


class EagerConvLora(nn.Module):
    """Conv-LoRA by the literal method, on the maps it is given."""

    def __init__(self, layer: ConvLoraLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        own = self.layer
        y, _ = conv_lora_linear(
            x, own.weight, own.bias, own.lora_A, own.lora_B, own.expert_weight, own.expert_bias,
            own.w_gate, own.w_noise, own.scaling, own.ratios,
            windows=Windows.whole(*x.shape[:3]), backend="reference",
        )  # fmt: skip
        return y


def peft_missing() -> str | None:
    return None if importlib.util.find_spec("peft") else "peft is not installed"


def peft_layer(layer: LoraLinear) -> nn.Module:
    """PEFT's own LoRA layer over the same weight; its factors are copies."""
    declare_missing_schemas()
    import peft

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(layer.in_features, layer.out_features, device="meta")
            self.layer.weight, self.layer.bias = layer.weight, layer.bias

    rank = layer.rank
    config = peft.LoraConfig(
        r=rank, lora_alpha=layer.scaling * rank, lora_dropout=0.0, target_modules=["layer"]
    )
    made = peft.get_peft_model(Holder(), config, autocast_adapter_dtype=False)
    made = made.base_model.model.layer
    for own, name in (("lora_A", "lora_A"), ("lora_B", "lora_B")):
        factor = getattr(made, own)["default"]
        factor.weight = nn.Parameter(getattr(layer, name).detach().clone())
    return made


class OtherAttention(nn.Module):
    """segment_anything's attention module around another way to compute it."""

    def __init__(self, stock: nn.Module, attend: Callable):
        super().__init__()
        self.qkv, self.proj = stock.qkv, stock.proj
        self.rel_pos_h, self.rel_pos_w = stock.rel_pos_h, stock.rel_pos_w
        self.heads, self.scale, self.attend = stock.num_heads, stock.scale, attend

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)
        rel = attention.factors(q, self.rel_pos_h, self.rel_pos_w, (height, width))
        out = self.attend(q, k, v, *rel, self.scale)
        out = out.unflatten(0, (batch, self.heads)).transpose(1, 2)
        return self.proj(out.reshape(batch, height, width, -1))


def sharing(module: nn.Module) -> nn.Module:
    """A copy whose Parameters and buffers are the module's own."""
    kept = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in kept})


def exchange(module: nn.Module, wanted: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Every submodule for which ``wanted`` gives another, in place; returns the module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if (other := wanted(child)) is not None:
                setattr(parent, name, other)
    return module


def eager_adapter(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, LoraLinear):
        return EagerLora(layer)
    return EagerConvLora(layer) if isinstance(layer, ConvLoraLinear) else None


def peft_adapter(layer: nn.Module) -> nn.Module | None:
    return peft_layer(layer) if isinstance(layer, LoraLinear) else None


def with_attention(attend: Callable) -> Callable[[nn.Module], nn.Module | None]:
    def wanted(module: nn.Module) -> nn.Module | None:
        stock = hasattr(module, "rel_pos_h") and hasattr(module, "qkv")
        return OtherAttention(module, attend) if stock else None

    return wanted


def peers(module: nn.Module, device: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What others would run in place of a stock block or encoder with our adapters, by name, and
    why some are not there."""
    stock = exchange(sharing(module), eager_adapter)
    made, missing = {"eager": stock}, {}
    if any(isinstance(m, LoraLinear) for m in module.modules()):
        if (reason := peft_missing()) is None:
            other = exchange(sharing(module), peft_adapter)
            made["SDPA + mask, PEFT"] = exchange(other, with_attention(attention.masked))
        else:
            missing["SDPA + mask, PEFT"] = reason
    made["augmented SDPA"] = exchange(sharing(stock), with_attention(attention.augmented))
    if device == "cuda":
        made["FlexAttention"] = exchange(sharing(stock), with_attention(attention.flex))
    return made, missing


def trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Weights as a trained model has them in size, tables and lora_B included."""
    for p in module.parameters():
        if p.dim() == 1:
            values = 0.1 * torch.randn(p.shape, generator=generator)
        else:
            scale = p[0].numel() ** -0.5
            values = scale * torch.randn(p.shape, generator=generator)
        p.copy_(values)
    for m in module.modules():
        if isinstance(m, nn.LayerNorm):
            m.weight.add_(1.0)
    return module
