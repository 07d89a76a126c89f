# SPDX-License-Identifier: Apache-2.0
"""What conv_experts launches at real sizes, on tensors without data."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common.windows import Windows
from samfast.kernels._common.without_data import meta
from samfast.kernels.conv_experts import triton_kernels as kernels


def launches(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """ViT-H's windows and global maps at batch 4 with eight experts, full and depthwise."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    windows, whole = Windows(4, 64, 64, 14, 14), Windows.whole(4, 64, 64)
    yield "conv_experts bfloat16 r3 windows", partial(run, windows, 3, bf16, less=not quick)
    if quick:
        return
    yield "conv_experts bfloat16 r3 global", partial(run, whole, 3, bf16)
    for depthwise in (False, True):
        kind = " depthwise" if depthwise else ""
        for dtype, rank in ((bf16, 4), (fp32, 16), (fp16, 64)):
            for form, name in ((windows, "windows"), (whole, "global")):
                name = f"conv_experts {str(dtype)[6:]} r{rank} {name}{kind}"
                yield name, partial(run, form, rank, dtype, depthwise)
    yield "conv_experts float32 r1 odd", partial(run, windows, 1, fp32, ratios=(1, 3))
    many = kernels.MAX_EXPERTS
    yield f"conv_experts float32 r3 M{many}", partial(run, windows, 3, fp32, ratios=(2,) * many)
    yield "conv_experts float32 r3 no gelu", partial(run, windows, 3, fp32, activation="none")


def run(
    windows,
    rank,
    dtype,
    depthwise=False,
    ratios=tuple(range(1, 9)),
    activation="gelu",
    less=True,
) -> None:
    """A forward and backward; with ``less``, also the backwards that make fewer gradients."""
    experts = len(ratios)
    h = meta(windows.tokens, rank, dtype=dtype)
    pad = meta(windows.batch * windows.pads, rank, dtype=dtype)
    weight, bias = meta(experts, rank, 1 if depthwise else rank, 3, 3), meta(experts, rank)
    index = meta(windows.samples, dtype=torch.int64)
    inputs = (h, weight, bias, index, windows, ratios, True, activation)
    balance = (meta(), meta(windows.samples, rank), meta(2, rank, experts))
    kernels.forward(*inputs)
    kernels.backward(h, pad, *inputs, balance, (True, True))
    if less:
        kernels.backward(h, None, *inputs, None, (True, False))
        kernels.backward(h, None, *inputs, None, (False, True))
