# SPDX-License-Identifier: Apache-2.0
"""What cobot_fold launches at real sizes, on tensors without data."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common import without_data
from samfast.kernels.cobot_fold import triton_kernels as kernels
from samfast.kernels.cobot_fold.triton_kernels import MAX_WIDTH


def launches(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """All of ViT-H's layers at once, and only one; the widest tile."""
    yield "cobot_fold float32 v4", partial(run, 4, 32, 2, False)
    if quick:
        return
    yield "cobot_fold float32 v16 down", partial(run, 16, 32, 1, True)
    yield "cobot_fold float32 v4 alone", partial(run, 4, 1, 2, False)
    for dtype, down in ((torch.float32, False), (torch.bfloat16, True)):
        name = f"cobot_fold {str(dtype)[6:]} v{MAX_WIDTH}{' down' if down else ''}"
        yield name, partial(run, MAX_WIDTH, 3, 1, down, dtype)


def run(width, layers, own, down, dtype=torch.float32, rows=1280) -> None:
    meta = partial(without_data.meta, dtype=dtype)
    slices = max(64, layers * own)
    lists = [
        [meta(own * width)] * layers,
        [meta(own, 4, width // 4, width // 4)] * layers,
        [meta(width, rows) if down else meta(own * rows, width)] * layers,
        [meta(width)] * layers if down else [],
    ]
    c, p = meta(1, width, slices), meta(slices, slices)
    folded, shifts = kernels.forward(c, p, *lists, 0, down)
    kernels.backward(folded, shifts if down else None, c, p, *lists, 0, down)
