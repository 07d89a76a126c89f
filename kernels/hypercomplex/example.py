# SPDX-License-Identifier: Apache-2.0
"""A small call of hypercomplex_linear, forward and backward, for self-checks."""

import torch

from samfast.kernels.hypercomplex import costs
from samfast.kernels.hypercomplex.op import hypercomplex_linear, supports
from samfast.kernels.lora_linear.costs import own_launches

RESULTS = ("y", "dx", "drules", "dweights", "dbias")
LAUNCHES = own_launches(costs.stages(42, 48, 80, 4, 2), "db")


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes this example here, or the sentence that says why not."""
    part = torch.empty(4, 4, 4, device=device)
    return supports(backend, device, dtype, part, part)


def run(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """A PHM layer from 48 to 80 features with n = 4; the tensors of RESULTS."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape):
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (numbers * 8).round() / 8

    x = draw(6, 7, 48).to(device, dtype).requires_grad_()
    parts = [draw(4, 4, 4), draw(4, 20, 12) / 8, draw(80)]
    parts = [t.to(device, wide).requires_grad_() for t in parts]
    y = hypercomplex_linear(x, *parts, backend=backend)
    dy = draw(6, 7, 80).to(device, dtype)
    return [y, *torch.autograd.grad(y, [x, *parts], dy)]
