# SPDX-License-Identifier: Apache-2.0
"""A small call of conv_experts, forward and backward, for self-checks."""

import torch

from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import costs
from samfast.kernels.conv_experts.op import conv_experts, supports
from samfast.kernels.lora_linear.costs import own_launches

RESULTS = ("z", "dh", "dweight", "dbias")
_STAGES = costs.stages(Windows.whole(2, 9, 9), [2, 3], range(1, 9), 3, False, 2)
LAUNCHES = own_launches(_STAGES, "noise", "gate")


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes this example here, or the sentence that says why not."""
    h = torch.empty(2, 3, device=device, dtype=dtype)
    return supports(backend, h, torch.empty(8, 3, 3, 3, 3, device=device))


def run(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two 9×9 windows, an odd and an even ratio, rank 3; the tensors of RESULTS."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    h = draw(2, 9, 9, 3).requires_grad_()
    weight, bias = (draw(8, 3, 3, 3, 3) / 5).requires_grad_(), draw(8, 3).requires_grad_()
    index = torch.tensor([2, 3], device=device)
    z = conv_experts(h, weight, bias, index, range(1, 9), backend=backend)
    return [z, *torch.autograd.grad(z, [h, weight, bias], draw(2, 9, 9, 3))]
