# SPDX-License-Identifier: Apache-2.0
"""Cores and products on a GPU (csrc/cuda/task_core.cu): one launch each way.

The native operators are one for both devices, so the calls are those of cpu_path.
"""

import torch

from samfast import backends
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
    capability = torch.cuda.get_device_capability(device)
    if capability < backends.OLDEST_CUDA:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if (absent := backends.native_missing()) is not None:
        return absent
    operator = "samfast_native::task_core_product"
    if not hasattr(torch.ops.samfast_native, "task_core_product"):
        return "the native extension is older than task_core; install samfast again"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"):
        return f"the extension has no CUDA kernels ({backends.build_record()['reason']})"
    return None
