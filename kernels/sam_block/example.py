# SPDX-License-Identifier: Apache-2.0
"""A small block with LoRA on q, v and on lin2, forward and backward, for self-checks."""

from functools import partial

import torch
import torch.nn.functional as F

from samfast.kernels._common.windows import Windows
from samfast.kernels.lora_linear.op import supports as lora_supports
from samfast.kernels.lora_linear.reference import lora_linear
from samfast.kernels.relpos_attention.op import supports as attention_supports
from samfast.kernels.sam_block import reference
from samfast.kernels.sam_block.op import sam_block, supports
from samfast.kernels.sam_block.plan import LayerPlan, Plan

RESULTS = ("y", "dx", "dtable_h", "dtable_w", "dlora_a of qkv", "dlora_b of qkv", "dlora_a of lin2",
           "dlora_b of lin2")  # fmt: skip
D, HEADS, WINDOW, SIZE = 32, 2, 7, (1, 9, 11)
SCALE, EPS, SCALING = 0.25, 1e-6, 0.5
Q_AND_V = LayerPlan(adapted=True, starts=(0, 2 * D), own=True)
LIN2 = LayerPlan(adapted=True, scaling=SCALING)


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes this example here, or the sentence that says why not."""
    if backend == "reference":
        return None
    x = torch.empty(*SIZE, D, device=device, dtype=dtype)
    a, b = x.new_empty(4, D), x.new_empty(2 * D, 2)
    q, windows = x.unflatten(3, (HEADS, -1)), Windows(*SIZE, WINDOW, WINDOW)
    answers = (
        supports(backend, x),
        lora_supports(backend, x, a, b, 2),
        attention_supports(backend, q, windows),
    )
    return next((sentence for sentence in answers if sentence is not None), None)


def run(backend: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two heads of 16 on a 9×11 map in padded 7×7 windows; the tensors of RESULTS."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, divisor=1.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) / divisor
        return values.to(device, dtype)

    def linear(outputs, inputs):
        return draw(outputs, inputs, divisor=inputs**0.5), draw(outputs)

    x, dy = draw(*SIZE, D), draw(*SIZE, D)
    norms = [draw(D) for _ in range(4)]
    tables = [draw(2 * WINDOW - 1, D // HEADS) for _ in range(2)]
    qkv, proj, lin1, lin2 = (
        linear(outputs, inputs) for outputs, inputs in ((96, 32), (32, 32), (64, 32), (32, 64))
    )
    of_qkv, of_lin2 = (draw(4, D), draw(2 * D, 2)), (draw(3, 2 * D), draw(D, 3))
    leaves = [t.requires_grad_() for t in (x, *tables, *of_qkv, *of_lin2)]
    if backend == "reference":
        norm1, norm2 = (
            partial(F.layer_norm, normalized_shape=(D,), weight=weight, bias=bias, eps=EPS)
            for weight, bias in (norms[:2], norms[2:])
        )
        y = reference.sam_block(
            x, norm1,
            lambda n: lora_linear(n, *qkv, *of_qkv, 1.0, slices=((0, D), (2 * D, 3 * D))),
            lambda n: F.linear(n, *proj), norm2, lambda n: F.linear(n, *lin1),
            lambda n: lora_linear(n, *lin2, *of_lin2, SCALING), *tables, HEADS, WINDOW, SCALE,
        )  # fmt: skip
    else:
        none, layers = (None, None, None), (Q_AND_V, LayerPlan(), LayerPlan(), LIN2)
        plan = Plan(HEADS, WINDOW, SCALE, (EPS, EPS), "", "fast", "", layers)
        parts = [*qkv, *of_qkv, None, *proj, *none, *lin1, *none, *lin2, *of_lin2, None]
        y, _ = sam_block(x, [*norms, *tables, *parts], plan, backend)
    return [y, *torch.autograd.grad(y, leaves, dy)]
