# SPDX-License-Identifier: Apache-2.0
"""What task_core launches at real sizes, on tensors without data."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common.without_data import meta
from samfast.kernels.task_core import triton_kernels as kernels


def launches(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """A windowed qkv of ViT-L at batch 4 with three tasks, and the cores of all its layers."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield "task_core bfloat16 r32", partial(run, (32, 32, 4), bf16, less=not quick)
    if quick:
        return
    for dtype in (bf16, fp16, fp32):
        for rank in (4, 16, 32, 64):
            yield f"task_core {str(dtype)[6:]} r{rank}", partial(run, (rank, rank, 4), dtype)
    yield "task_core float32 r64x5", partial(run, (64, 5, 3), fp32, entries=12)
    yield "task_core bfloat16 r7x64", partial(run, (7, 64, 17), bf16, tasks=2)
    yield "task_core bfloat16 r40x24", partial(run, (40, 24, 4), bf16, tokens=4 * 341)
    yield "task_core bfloat16 cores", partial(run, (32, 32, 4), bf16, cores=bf16)


def run(ranks, dtype, tasks=3, entries=3, tokens=12 * 4900, cores=torch.float32, less=True) -> None:
    """Both forwards and backwards; with ``less``, also the backwards that make fewer gradients."""
    rows, _, depth = ranks
    gathered = meta(24, *ranks, dtype=cores), meta(24, tasks, depth, dtype=cores)
    m = kernels.fold(*gathered)[:1].expand(kernels.PARTS, -1, -1, -1)
    kernels.fold_backward(meta(24, kernels.PARTS, *m.shape[1:]), *gathered)
    h, task = meta(tokens, rows, dtype=dtype), meta(entries, dtype=torch.int64)
    z = kernels.product(h, m, task)
    for needs in ((True, True), (True, False), (False, True))[: 3 if less else 1]:
        kernels.product_backward(z, h, m, task, needs)
