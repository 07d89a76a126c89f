# SPDX-License-Identifier: Apache-2.0
"""What adapt_former launches at real sizes, on tensors without data."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common.without_data import in_tf32, meta
from samfast.kernels.adapt_former import triton_kernels as kernels


def launches(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """The branch of ViT-H's and ViT-B's MLPs at batch 4; every padded bottleneck, rows that are
    not a multiple of sixteen elements, float32 rows with narrow products."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield "adapt_former bfloat16 v16", partial(run, 1280, 16, bf16, bf16, 0.1, less=not quick)
    if quick:
        return
    yield "adapt_former bfloat16 v8 vit_b", partial(run, 768, 8, bf16, bf16)
    for dtype, widest in ((bf16, 128), (fp32, 32)):
        for bottleneck in (v for v in (16, 24, 32, 64, 100, 128) if v <= widest):
            name = f"adapt_former {str(dtype)[6:]} v{bottleneck}"
            yield name, partial(run, 1280, bottleneck, dtype, dtype, 0.1)
    yield "adapt_former float16 v16", partial(run, 1280, 16, fp16, fp16, 0.1)
    for bottleneck in (16, 32, 64, 128):
        name = f"adapt_former bfloat16 v{bottleneck} float32 rows"
        yield name, partial(run, 768, bottleneck, bf16, fp32, 0.1)
    for bottleneck in (16, 32):
        name = f"adapt_former tf32 v{bottleneck}"
        yield name, in_tf32(partial(run, 1280, bottleneck, fp32, fp32))
    odd = 4 * 4096 - 1
    for bottleneck, dtype in ((1, bf16), (128, bf16), (32, fp32)):
        name = f"adapt_former {str(dtype)[6:]} v{bottleneck} odd"
        yield name, partial(run, 100, bottleneck, dtype, dtype, 0.1, odd)
    yield "adapt_former bfloat16 v128 odd float32 rows", partial(run, 100, 128, bf16, fp32, 0.1)


def run(width, bottleneck, dtype, rows, dropout=0.0, tokens=4 * 4096, less=True) -> None:
    """A forward and backward up to z; with ``less``, also the backwards that make fewer gradients
    or add to a gradient that is there."""
    x, dx = meta(tokens, width, dtype=rows), meta(tokens, width, dtype=rows)
    norm = (meta(width), meta(width))
    down, down_bias = meta(bottleneck, width), meta(bottleneck)
    seed = meta(1, dtype=torch.int64) if dropout else None
    z = kernels.low(x, *norm, down, down_bias, 1e-5, dropout, seed, dtype)
    calls = (
        (dx, (True,) * 5),
        (None, (True,) * 5),
        (None, (True, *(False,) * 4)),
        (dx, (True, *(False,) * 4)),
        (None, (False, *(True,) * 4)),
        (None, (False, True, False, False, True)),
    )
    for onto, needs in calls if less else calls[:1]:
        kernels.low_backward(onto, z, z, x, *norm, down, 1e-5, dropout, needs)
