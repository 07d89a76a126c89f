# SPDX-License-Identifier: Apache-2.0
"""Which code runs the products with tasks' cores, and the folding of these cores."""

import importlib

import torch
from torch import Tensor

from samfast.kernels._common import backends

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FILES = {"torch": "torch_path", "cpu": "cpu_path", "triton": "triton_kernels", "cuda": "cuda_path"}


def supports(backend: str, h: Tensor, m: Tensor) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not.

    h: (…, R1)   m: (…, R1, R2), of which sizes, dtypes and device alone are looked at
    """
    if backend in ("reference", "torch"):
        return None
    for name, t in (("the cores", m), ("h", h)):
        if t.dtype == torch.float64:
            verb = "is" if name == "h" else "are"
            return f"{name} {verb} {t.dtype}, but the kernels take float32, float16 and bfloat16"
    if backend == "cpu":
        return backends.cpu_missing(h.device, h.dtype, "task_core_product")
    rank = max(m.shape[-2:])
    if backend == "cuda":
        from samfast.kernels.task_core import cuda_path

        return cuda_path.missing(h.device, rank)
    if (missing := backends.triton_missing(h.device)) is not None:
        return missing
    from samfast.kernels.task_core import triton_kernels

    if rank > triton_kernels.MAX_RANK:
        return f"rank {rank} is above {triton_kernels.MAX_RANK}, the widest tile"
    return None


def core_backend(backend: str, h: Tensor, m: Tensor) -> str:
    """The backend that multiplies h (…, R1) with cores m (…, R1, R2)."""
    asked = backends.requested(backend)
    return backends.resolve("task_core", asked, h.device, lambda b: supports(b, h, m))


def path_of(backend: str, h: Tensor, m: Tensor):
    """Its module: fold, fold_backward, product, product_backward and PARTS as in torch_path."""
    name = core_backend(backend, h, m)
    if name == "reference":
        raise RuntimeError("backend 'reference' is plain autograd; call task_core for it")
    return importlib.import_module(f"samfast.kernels.task_core.{_FILES[name]}")
