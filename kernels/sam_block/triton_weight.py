# SPDX-License-Identifier: Apache-2.0
"""A layer's weight with its adapter's factor behind it, so that one product makes the result with
the update: [x | z] [W | s · B]ᵀ."""

import triton
import triton.language as tl

from samfast.kernels._common.launched import launched


@triton.jit(launch_metadata=launched(__package__))
def joint_weight_kernel(
    weight_ptr, b_ptr, made_ptr, outputs, columns, width, stride_wm, scaling,
    RANKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """made (outputs, width): W, then s · B (outputs, RANKS), then zeros."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    live = rows < outputs
    kind = made_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + rows * stride_wm + offs, live & (offs < columns), other=0.0)
    rank = offs - columns
    of_adapter = live & (rank >= 0) & (rank < RANKS)
    b = tl.load(b_ptr + rows * RANKS + rank, of_adapter, other=0.0).to(tl.float32) * scaling
    value = tl.where(rank < 0, weight.to(kind), b.to(kind))
    tl.store(made_ptr + rows * width + offs, value, live & (offs < width))
