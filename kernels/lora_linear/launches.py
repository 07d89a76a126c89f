# SPDX-License-Identifier: Apache-2.0
"""What lora_linear launches at real sizes, on tensors without data."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common.without_data import in_tf32, meta
from samfast.kernels.lora_linear import triton_kernels as kernels
from samfast.kernels.lora_linear.engine import Slices


def launches(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """A windowed qkv of ViT-H at batch 4; every padded rank, divisible by sixteen and not."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if quick:
        yield "lora_linear bfloat16 r4", partial(run, 4, bf16)
        return
    for dtype, ranks in ((bf16, (1, 4, 16, 32, 64, 128)), (fp32, (4, 16, 32))):
        for rank in ranks:
            for dropout in (0.0, 0.1) if rank > 1 else (0.0,):
                name = f"lora_linear {str(dtype)[6:]} r{rank}{' dropout' if dropout else ''}"
                yield name, partial(run, rank, dtype, dropout, less=True)
    others = {
        "bfloat16 r100 dropout": (100, bf16, 0.1),
        "float32 r24 dropout": (24, fp32, 0.1),
        "float16 r4 qv": (4, fp16, 0.0, True),
        "bfloat16 r32 dropout qv shared": (32, bf16, 0.1, True, True),
        "bfloat16 r4 vit_b": (4, bf16, 0.0, False, False, 4900, 768),
    }
    for name, arguments in others.items():
        yield f"lora_linear {name}", partial(run, *arguments)
    for rank, dropout in ((4, 0.0), (32, 0.1)):
        name = f"lora_linear tf32 r{rank}{' dropout' if dropout else ''}"
        yield name, in_tf32(partial(run, rank, fp32, dropout))


def run(
    rank, dtype, dropout=0.0, slices=False, shared=False, tokens=4 * 4900, width=1280, less=False
) -> None:
    """A forward and backward; with ``less``, also the backwards that make fewer gradients."""
    features, out = width, 3 * width
    starts = (0, 2 * features) if slices else ()
    n = max(len(starts), 1)
    own = slices and not shared
    a = meta((n if own else 1) * rank, features)
    b = meta(n * features if slices else out, rank)
    x, y = meta(tokens, features, dtype=dtype), meta(tokens, out, dtype=dtype)
    layout = Slices(starts, b, own)
    seed = meta(1, dtype=torch.int64) if dropout else None
    h = kernels.down(x, a, dropout, seed)
    kernels.up_(y, h, b, 2.0, layout)
    kernels.up_backward(y, h, b, 2.0, layout)
    kernels.down_backward_(x, h, x, a, dropout, seed)
    if less:
        kernels.up_backward(y, None, b, 2.0, layout)
        kernels.down_backward_(None, h, x, a, dropout, seed)
        kernels.down_backward_(x, h, None, a, dropout, seed)
