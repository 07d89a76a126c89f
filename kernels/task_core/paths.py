# SPDX-License-Identifier: Apache-2.0
"""Which code runs the products with tasks' cores, and which folds these cores."""

from torch import Tensor

from samfast.kernels._common import backends
from samfast.kernels._common.table import Table, double

TABLE = Table("task_core", __package__, native="task_core_product")


def supports(backend: str, h: Tensor, m: Tensor) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not.

    h: (…, R1)   m: (…, R1, R2), of which only sizes, dtypes and device are looked at
    """
    dtypes = {"the cores": m.dtype, "h": h.dtype}
    if backend in ("reference", "torch"):
        return None
    if (missing := double(**dtypes) or TABLE.missing(backend, h.device, h=h.dtype)) is not None:
        return missing
    rank = max(m.shape[-2:])
    if backend == "cuda":
        from samfast.kernels.task_core import cuda_path

        return cuda_path.missing(h.device, rank)
    if backend == "triton":
        from samfast.kernels.task_core import triton_kernels

        if rank > triton_kernels.MAX_RANK:
            return f"rank {rank} is above {triton_kernels.MAX_RANK}, the widest tile"
    return None


def core_backend(backend: str, h: Tensor, m: Tensor) -> str:
    """The backend that multiplies h (…, R1) with cores m (…, R1, R2)."""
    asked = backends.requested(backend)
    return TABLE.choose(asked, h.device, lambda b: supports(b, h, m))


def path_of(backend: str, h: Tensor, m: Tensor):
    """Its module: fold, fold_backward, product, product_backward and PARTS as in torch_path."""
    return TABLE.path(backends.requested(backend), h.device, lambda b: supports(b, h, m))
