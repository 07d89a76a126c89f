# SPDX-License-Identifier: Apache-2.0
"""The routed experts on a GPU (csrc/cuda/conv_experts.cu): one launch forward, two backward.

The native operators are one for both devices, so the calls are those of cpu_path.
"""

import torch

from samfast.kernels._common import backends
from samfast.kernels.conv_experts.cpu_path import backward, forward

__all__ = ["MAX_EXPERTS", "MAX_RANK", "backward", "forward", "missing"]

MAX_RANK = 16  # what a block keeps of its points is 64 KiB then, of the 99 KiB every target has
MAX_EXPERTS = 64  # their ratios travel as an argument of the kernel
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def missing(h, weight):
    """None when the CUDA kernels take this call, or the sentence that says why they do not."""
    if h.device.type != "cuda":
        return f"h is on {h.device.type}, but the CUDA kernels need a CUDA device"
    if h.dtype not in DTYPES:
        return f"h is {h.dtype}, but the kernels take float32, float16 and bfloat16"
    experts, rank = weight.shape[:2]
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}, the most a block has shared memory for"
    if experts > MAX_EXPERTS:
        return f"{experts} experts are more than the {MAX_EXPERTS} the kernels take"
    return backends.cuda_missing(h.device, "conv_experts_forward")
