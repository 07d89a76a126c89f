# SPDX-License-Identifier: Apache-2.0
"""A small call of expert_gate, forward and backward, for self-checks."""

import torch

from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts import costs
from samfast.kernels.expert_gate.op import expert_gate, supports
from samfast.kernels.lora_linear.costs import own_launches

RESULTS = ("expert_index", "loss", "dh", "dw_gate", "dw_noise")
_STAGES = costs.stages(Windows.whole(12, 3, 3), [0] * 12, range(1, 9), 3, False, 2)
LAUNCHES = own_launches([stage for stage in _STAGES if stage.name == "gate"])


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes this example here, or the sentence that says why not."""
    h = torch.empty(2, 3, device=device, dtype=dtype)
    return supports(backend, h, torch.empty(3, 8, device=device))


def run(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The training gate over twelve small windows, rank 3; the tensors of RESULTS.

    Weights are float32 at least, and the numbers short, so that every dtype makes one choice.
    """
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape):
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (numbers * 8).round() / 8

    h = draw(12, 3, 3, 3).to(device, dtype).requires_grad_()
    w_gate, w_noise = (draw(3, 8).to(device, wide).requires_grad_() for _ in range(2))
    noise = draw(12, 8).to(device, wide)
    index, loss = expert_gate(h, w_gate, w_noise, noise=noise, backend=backend)
    return [index, loss, *torch.autograd.grad(loss, [h, w_gate, w_noise])]
