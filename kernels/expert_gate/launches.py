# SPDX-License-Identifier: Apache-2.0
"""What expert_gate launches at real sizes, on tensors without data."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from samfast.kernels._common.windows import Windows
from samfast.kernels._common.without_data import meta
from samfast.kernels.expert_gate import triton_kernels as kernels
from samfast.kernels.expert_gate.triton_kernels import MAX_EXPERTS, MAX_RANK


def launches(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """The gate of ViT-H's windows at batch 4, training and not, and of the widest tiles."""
    windows, whole = Windows(4, 64, 64, 14, 14), Windows.whole(4, 64, 64)
    yield "expert_gate bfloat16 r3", partial(run, windows, 3, 8, torch.bfloat16)
    if quick:
        return
    for noisy, given in ((True, True), (False, False), (False, True)):
        name = f"expert_gate float32 r4{' noise' if noisy else ''}"
        yield name, partial(run, whole, 4, 8, torch.float32, noisy, given)
    name = f"expert_gate float16 r{MAX_RANK} M{MAX_EXPERTS}"
    yield name, partial(run, windows, MAX_RANK, MAX_EXPERTS, torch.float16)


def run(windows, rank, experts, dtype, noisy=True, given=False) -> None:
    noise = meta(windows.samples, experts) if noisy else None
    index = meta(windows.samples, dtype=torch.int64) if given else None
    h, weight = meta(windows.tokens, rank, dtype=dtype), meta(rank, experts)
    kernels.forward(h, weight, weight, noise, index, windows, 0.01)
