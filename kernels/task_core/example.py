# SPDX-License-Identifier: Apache-2.0
"""A small call of task_core, forward and backward, for self-checks."""

import torch

from samfast.kernels.lora_linear.costs import own_launches
from samfast.kernels.task_core import costs
from samfast.kernels.task_core.op import supports, task_core

RESULTS = ("z", "dh", "dcore", "dfactor_task")
_STAGES = [*costs.product(21, 8, 5, 2, 2), *costs.cores(1, 8, 5, 2, 2)]
LAUNCHES = own_launches(_STAGES, "gather", "stack dM", "gather again")


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes this example here, or the sentence that says why not."""
    h = torch.empty(6, 8, device=device, dtype=dtype)
    return supports(backend, h, torch.empty(8, 5, device=device, dtype=torch.float32))


def run(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Three samples of two tasks, ranks 8 and 5; the tensors of RESULTS."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape, dtype=wide):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return ((drawn * 8).round() / 8).to(device, dtype).requires_grad_()

    h, core, factor = draw(3, 7, 8, dtype=dtype), draw(8, 5, 2), draw(2, 2)
    task = torch.tensor([1, 0, 1], device=device)
    z = task_core(h, core, factor, task, backend=backend)
    dz = draw(3, 7, 5, dtype=dtype).detach()
    return [z.detach(), *torch.autograd.grad(z, [h, core, factor], dz)]
