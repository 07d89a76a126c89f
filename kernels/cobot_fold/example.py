# SPDX-License-Identifier: Apache-2.0
"""A small call of cobot_fold, forward and backward, for self-checks."""

import torch

from samfast.kernels.cobot_fold.op import cobot_fold, supports

RESULTS = ("folded", "dc", "dp", "dgamma", "dheads", "dfactor")
LAUNCHES = 3  # the fold, its backward, and the gradients that slices share


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes this example here, or the sentence that says why not."""
    factor = torch.empty(2, 8, device=device, dtype=dtype)
    return supports(backend, torch.empty(1, 8, 4, device=device, dtype=dtype), factor)


def run(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """One layer of two slices among four, rank 8; the tensors of RESULTS."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype).requires_grad_()

    c, p, gamma, heads, factor = draw(1, 8, 4), draw(4, 4), draw(16), draw(2, 4, 2, 2), draw(48, 8)
    (folded,), _ = cobot_fold(c, p, [gamma], [heads], [factor], first=2, backend=backend)
    grads = torch.autograd.grad(folded, [c, p, gamma, heads, factor], torch.ones_like(folded))
    return [folded.detach(), *grads]
