# SPDX-License-Identifier: Apache-2.0
"""A small call of lora_linear, forward and backward, for self-checks."""

import torch

from samfast.kernels.lora_linear import costs
from samfast.kernels.lora_linear.op import lora_linear, supports

RESULTS = ("y", "dx", "dlora_a", "dlora_b")
LAUNCHES = costs.own_launches(costs.stages(196, 192, 576, 4, 2))


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes this example here, or the sentence that says why not."""
    a = torch.empty(4, 192, device=device)
    return supports(backend, a.to(dtype), a, a.new_empty(384, 4), 2)


def run(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """LoRA on q and v of a packed qkv over one 14×14 window, width 192; the tensors of RESULTS."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, weight, bias = draw(1, 14, 14, 192).requires_grad_(), draw(576, 192) / 14, draw(576)
    a, b = (draw(8, 192) / 14).requires_grad_(), draw(384, 4).requires_grad_()
    slices = ((0, 192), (384, 576))
    y = lora_linear(x, weight, bias, a, b, 1.0, slices=slices, backend=backend)
    return [y, *torch.autograd.grad(y, [x, a, b], draw(1, 14, 14, 576))]
