# SPDX-License-Identifier: Apache-2.0
"""The two passes on a GPU (csrc/cuda/hypercomplex.cu): one launch forward, two backward.

The native operators are one for both devices, so the calls are those of cpu_path.
"""

from samfast.kernels._common import backends
from samfast.kernels.hypercomplex.cpu_path import build, contract

__all__ = ["MAX_TERMS", "build", "contract", "missing"]

MAX_TERMS = 16  # a block keeps that many rows of weights, and of their gradient


def missing(device, terms):
    """None when the CUDA kernels take this call, or the sentence that says why they do not."""
    if device.type != "cuda":
        return f"x is on {device.type}, but the CUDA kernels need a CUDA device"
    if terms > MAX_TERMS:
        return f"{terms} terms are more than {MAX_TERMS}, the most a block keeps"
    return backends.cuda_missing(device, "hypercomplex_build")
