# SPDX-License-Identifier: Apache-2.0
"""The two passes on a GPU (csrc/cuda/hypercomplex.cu): one launch forward, two backward.

The native operators are one for both devices, so the calls are those of cpu_path.
"""

import torch

from samfast import backends
from samfast.kernels.hypercomplex.cpu_path import build, contract

__all__ = ["MAX_TERMS", "build", "contract", "missing"]

MAX_TERMS = 16  # a block keeps that many rows of weights, and of their gradient


def missing(device, terms):
    """None when the CUDA kernels take this call, or the sentence that says why they do not."""
    if device.type != "cuda":
        return f"x is on {device.type}, but the CUDA kernels need a CUDA device"
    if terms > MAX_TERMS:
        return f"{terms} terms are more than {MAX_TERMS}, the most a block keeps"
    capability = torch.cuda.get_device_capability(device)
    if capability < backends.OLDEST_CUDA:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if (absent := backends.native_missing()) is not None:
        return absent
    operator = "samfast_native::hypercomplex_build"
    if not hasattr(torch.ops.samfast_native, "hypercomplex_build"):
        return "the native extension is older than hypercomplex_build; install samfast again"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"):
        return f"the extension has no CUDA kernels ({backends.build_record()['reason']})"
    return None
