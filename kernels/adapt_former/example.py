# SPDX-License-Identifier: Apache-2.0
"""A small call of adapt_former, forward and backward, for self-checks."""

import torch

from samfast.kernels.adapt_former import costs
from samfast.kernels.adapt_former.engine import supports
from samfast.kernels.adapt_former.op import SIDE, adapt_former
from samfast.kernels.lora_linear.costs import own_launches
from samfast.kernels.lora_linear.op import supports as up_supports

RESULTS = ("y", *(f"d{name}" for name in ("x", "base", *SIDE)))
D, V = 96, 16
LAUNCHES = own_launches(costs.stages(98, D, V, 2), "base + b_up", "db_up")


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes this example here, or the sentence that says why not."""
    z = torch.empty(2, V, device=device, dtype=dtype)
    sentence = supports(backend, z.new_empty(2, D), V, dtype)
    if sentence is not None or backend == "reference":
        return sentence
    return up_supports(backend, z, z.new_empty(V, D), z.new_empty(D, V))


def run(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """A bottleneck of 16 with dropout, on a 7×7 map of width 96; the tensors of RESULTS."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, divisor=1.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) / divisor
        return values.to(device, dtype)

    shape = (2, 7, 7, D)
    leaves = [draw(*shape), draw(*shape), draw(D), draw(D), draw(V, D, divisor=D**0.5), draw(V)]
    leaves += [draw(D, V, divisor=V**0.5), draw(D)]
    seed = torch.tensor([5], device=device)
    leaves = [t.requires_grad_() for t in leaves]
    y = adapt_former(*leaves, dropout=0.1, seed=seed, backend=backend)
    return [y, *torch.autograd.grad(y, leaves, draw(*shape))]
