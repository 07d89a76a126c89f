# SPDX-License-Identifier: Apache-2.0
"""Conv-LoRA as plain operators for export: every expert runs, and the gate weights the results.

A graph has no branches. Experts that the gate leaves out thus run too, and zeros replace them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts.reference import expert


class DenseConvLora(nn.Module):
    """``ConvLoraLinear`` in evaluation, without samfast's operators and with any number of maps.

    base: the frozen linear layer; the other arguments as in ConvLoraLinear
    x: (N, H, W, in_features), or (N, H·W, in_features) -> (…, out_features)
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    expert_weight: nn.Parameter
    expert_bias: nn.Parameter
    w_gate: nn.Parameter

    def __init__(
        self,
        base: nn.Linear,
        lora_A: Tensor,
        lora_B: Tensor,
        expert_weight: Tensor,
        expert_bias: Tensor,
        w_gate: Tensor,
        *,
        scaling: float,
        ratios: tuple[int, ...],
        top_k: int,
        formula: str,
    ) -> None:
        super().__init__()
        self.base = base
        tensors = {"lora_A": lora_A, "lora_B": lora_B, "w_gate": w_gate}
        tensors |= {"expert_weight": expert_weight, "expert_bias": expert_bias}
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        self.scaling, self.ratios, self.top_k, self.formula = scaling, ratios, top_k, formula

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        windows = windows_of(x, size)
        maps = (windows.samples, windows.height, windows.width, self.lora_A.shape[0])
        h = F.linear(x, self.lora_A.to(x.dtype)).reshape(maps)
        index, gates = self.routes(h)
        paper = self.formula == "paper"
        z = torch.zeros_like(h) if paper else h
        for number in range(len(self.ratios)):
            made = self._expert(h, number)
            for k in range(self.top_k):
                here = (index[:, k] == number)[:, None, None, None]
                weighted = made * gates[:, k, None, None, None] if self.top_k > 1 or paper else made
                z = z + torch.where(here, weighted, torch.zeros_like(weighted))
        y = self.base(x)
        return y + self.scaling * F.linear(z, self.lora_B.to(x.dtype)).reshape(y.shape)

    def routes(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts (N, top_k) and their weights for h (N, H, W, rank)."""
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        logits = wide.mean((1, 2)) @ self.w_gate.to(wide.dtype)
        if self.top_k == 1:
            index = logits.argmax(1, keepdim=True)  # the first of equals, as in the layer
            return index, torch.ones_like(logits[:, :1]).to(h.dtype)
        values, index = logits.topk(self.top_k, 1)
        return index, values.softmax(1).to(h.dtype)

    def _expert(self, h: Tensor, number: int) -> Tensor:
        weight, bias = (t[number].to(h.dtype) for t in (self.expert_weight, self.expert_bias))
        activation = "none" if self.formula == "paper" else "gelu"
        groups = h.shape[-1] // weight.shape[1]
        return expert(h, weight, bias, self.ratios[number], activation, groups)


def windows_of(x: Tensor, size: tuple[int, int] | None) -> Windows:
    """View each map of x as a window of its own; size: as in ConvLoraLinear.forward."""
    shape = tuple(x.shape)
    if x.dim() in (3, 4) and 0 in shape[1:-1]:
        raise ValueError(f"x has shape {shape}, maps without pixels")
    if size is not None and (len(size) != 2 or not all(type(n) is int for n in size)):
        raise ValueError(f"size is {size!r}; it must be two whole numbers, (H, W)")
    if x.dim() == 4:
        if size is not None and tuple(size) != shape[1:3]:
            raise ValueError(f"x has shape {shape}, whose maps are not {tuple(size)}")
        return Windows.whole(*shape[:3])
    if x.dim() != 3:
        raise ValueError(f"x has shape {shape}, but must be (N, H, W, D) or (N, L, D)")
    length = shape[1]
    if size is None:
        side = int(length**0.5 + 0.5)  # torch.compile cannot trace isqrt
        if side * side != length:
            raise ValueError(
                f"expected a square map, got {length} tokens (x has shape {shape}); pass "
                "size=(height, width)"
            )
        return Windows.whole(shape[0], side, side)
    height, width = size
    if height < 1 or width < 1 or height * width != length:
        raise ValueError(f"x has {length} tokens, which do not fill a map of {height} × {width}")
    return Windows.whole(shape[0], height, width)
