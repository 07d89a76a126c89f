# SPDX-License-Identifier: Apache-2.0
"""A small call of window_attention, forward and backward, for self-checks."""

import torch

from samfast.kernels._common.windows import Windows
from samfast.kernels.lora_linear.costs import own_launches
from samfast.kernels.window_attention import costs
from samfast.kernels.window_attention.op import supports, window_attention

RESULTS = ("out", "dqkv", "dpad_bias")
LAUNCHES = own_launches(costs.stages(Windows(1, 9, 11, 7, 7), 2, 16, 2))


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes this example here, or the sentence that says why not."""
    q = torch.empty(1, 9, 11, 2, 16, device=device, dtype=dtype)
    return supports(backend, q, Windows(1, 9, 11, 7, 7))


def run(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two heads of 16 on a 9×11 map in padded 7×7 windows; the tensors of RESULTS."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    qkv, bias = draw(1, 9, 11, 96), draw(96)
    out = window_attention(qkv, 2, 7, pad_bias=bias, backend=backend)
    dout = draw(1, 9, 11, 32).detach()
    return [out, *torch.autograd.grad(out, [qkv, bias], dout)]
