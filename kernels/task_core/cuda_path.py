# SPDX-License-Identifier: Apache-2.0
"""Cores and products on a GPU (csrc/cuda/task_core.cu): one launch each way.

The native operators are one for both devices, so the calls are those of cpu_path.
"""

from samfast.kernels._common import backends
from samfast.kernels.task_core.cpu_path import fold, fold_backward, product, product_backward

__all__ = ["MAX_RANK", "PARTS", "fold", "fold_backward", "missing", "product", "product_backward"]

PARTS = 32
MAX_RANK = 64  # a block keeps a core and its rows in 48 KiB


def missing(device, rank):
    """None when the CUDA kernels take this call, or the sentence that says why they do not."""
    if device.type != "cuda":
        return f"h is on {device.type}, but the CUDA kernels need a CUDA device"
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}, the most a block has shared memory for"
    return backends.cuda_missing(device, "task_core_product")
