# SPDX-License-Identifier: Apache-2.0
"""A small call of rope, forward and backward, for self-checks."""

import torch

from samfast.kernels.lora_linear.costs import own_launches
from samfast.kernels.rope import costs
from samfast.kernels.rope.op import rope, supports
from samfast.kernels.rope.tables import axial_tables

RESULTS = ("out", "dqkv")
LAUNCHES = own_launches(costs.stages(2 * 5 * 7, 12, 2, 16, 2))


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes this example here, or the sentence that says why not."""
    return supports(backend, torch.empty(2, 5, 7, 2, 2, 16, device=device, dtype=dtype))


def run(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two heads of 16 on 5×7 maps in windows of 3×4; the tensors of RESULTS."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype).requires_grad_()

    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = (t.to(device, wide) for t in axial_tables(3, 4, 16, theta=100.0))
    qkv = draw(2, 5, 7, 96)
    out = rope(qkv, cos, sin, heads=2, window=(3, 4), backend=backend)
    return [out.detach(), *torch.autograd.grad(out, qkv, draw(2, 5, 7, 96).detach())]
