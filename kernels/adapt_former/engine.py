# SPDX-License-Identifier: Apache-2.0
"""The branch in two halves: up to z in this folder, and from z on in lora_linear.

``op`` joins them next to any base; ``sam_block`` joins them inside its own node.
"""

import torch
from torch import Tensor

from samfast.kernels._common.table import Table
from samfast.kernels.lora_linear.engine import Slices
from samfast.kernels.lora_linear.op import MAX_TRITON_RANK
from samfast.kernels.lora_linear.op import TABLE as UP_TABLE
from samfast.kernels.lora_linear.op import path_of as engine_path_of

TABLE = Table(
    "adapt_former",
    __package__,
    absent={
        "cpu": "its stages have no C++ source; torch runs them on a CPU",
        "cuda": "its stages have no CUDA source; triton runs them on a GPU",
    },
)


def supports(backend: str, x: Tensor, bottleneck: int, dtype: torch.dtype) -> str | None:
    """None when the backend takes this call, or the sentence that says why it does not.

    dtype: of the products; the up-projection has a choice of its own
    """
    wide = torch.promote_types(x.dtype, dtype)
    missing = TABLE.missing(backend, x.device, x=wide)
    if missing is not None or backend != "triton":
        return missing
    widest = MAX_TRITON_RANK[dtype.itemsize]
    if bottleneck > widest:
        return f"a bottleneck of {bottleneck} is above {widest}, the widest tile for {dtype}"
    return None


def backend_of(backend: str, x: Tensor, bottleneck: int, dtype: torch.dtype) -> str:
    """The backend that runs the half up to z when the call asks for ``backend``."""
    return TABLE.choose(TABLE.part(backend), x.device, lambda b: supports(b, x, bottleneck, dtype))


def path_of(backend: str, x: Tensor, bottleneck: int, dtype: torch.dtype):
    return TABLE.path(TABLE.part(backend), x.device, lambda b: supports(b, x, bottleneck, dtype))


def up_path_of(backend: str, z: Tensor, up: Tensor):
    """The path that multiplies by ``up`` (D, V)."""
    return engine_path_of(UP_TABLE.part(backend), z, up.t(), up, ())


def add_up_(path, out: Tensor, z: Tensor, up: Tensor) -> None:
    """out += z upᵀ in place."""
    path.up_(out, z, up, 1.0, Slices((), up, False))


def up_backward(
    path, dy: Tensor, z: Tensor, up: Tensor, need_up: bool
) -> tuple[Tensor, Tensor | None]:
    """dz = dy up, and up's gradient dyᵀ z."""
    return path.up_backward(dy, z if need_up else None, up, 1.0, Slices((), up, False))


def column_sum(dy: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias that was added to every row."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, bias.dtype)).to(bias.dtype)
