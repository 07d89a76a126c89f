# SPDX-License-Identifier: Apache-2.0
"""The block's attention, of one of KINDS, in both directions.

relpos adds relative positions to the logits. rope rotates q and k by their places in the window, in
qkv's own memory, and rotates their gradients back. plain does neither.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from samfast.kernels._common.ranges import stage
from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention.op import TABLE as RELPOS
from samfast.kernels.rope.engine import TABLE as ROPE
from samfast.kernels.rope.engine import pad_rows, rotate_
from samfast.kernels.sam_block.plan import Plan
from samfast.kernels.window_attention.op import TABLE as PLAIN

Pads = tuple[Tensor | None, Tensor | None, Tensor | None]  # bias, and two factors, of the padding


class Attention:
    """qkv (B, H, W, 3, heads, head_dim) -> out (B, H, W, heads, head_dim), by windows.

    tables: as the plan's kind has them   backend: the block's
    """

    def __init__(self, plan: Plan, windows: Windows, tables: Sequence[Tensor | None], backend: str):
        self.plan, self.windows, self.tables = plan, windows, list(tables)
        own = RELPOS if plan.kind == "relpos" else PLAIN
        self.backend = plan.attention or own.part(backend)
        self.rotary_backend = ROPE.part(backend)

    def rotate_(self, qkv: Tensor, inverse: bool = False) -> None:
        """Rotate q and k, or their gradients back, if the kind is rope."""
        if self.plan.kind != "rope":
            return
        with stage("sam_block", "rope"):
            wide = torch.promote_types(qkv.dtype, torch.float32)
            tables = (table.to(wide) for table in self.tables)
            rotate_(
                self.rotary_backend, qkv[:, :, :, :2], *tables, self.windows, self.plan.halves,
                inverse,
            )  # fmt: skip

    def forward(self, qkv: Tensor, pads: Pads) -> tuple[Tensor, Tensor]:
        """out and lse; q and k are already rotated."""
        with stage("sam_block", "attention"):
            return self._operator("forward")(qkv, *self._options(pads))

    def backward(
        self, dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, pads: Pads,
        needs: Sequence[bool], need_tables: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        """dqkv, the gradients of the padding's three tensors, and those of the tables.

        needs: of the padding's
        """
        given = pads[0] is not None, pads[1] is not None, pads[1] is not None
        needs = [need and there for need, there in zip(needs, given, strict=True)]
        wanted = [True, *needs, *(need_tables if self.plan.kind == "relpos" else ())]
        with stage("sam_block", "attention"):
            made = iter(
                self._operator("backward")(
                    dout.view(out.shape), out, lse, qkv, *self._options(pads), wanted
                )
            )
        dqkv, *of_pads = (next(made) if need else None for need in (True, *needs))
        self.rotate_(dqkv, inverse=True)
        return dqkv, of_pads, [next(made) if need else None for need in need_tables]

    def _operator(self, way: str):
        name = "window_relpos_attention" if self.plan.kind == "relpos" else "window_attention"
        return getattr(torch.ops.samfast, f"{name}_{way}")

    def _options(self, pads: Pads) -> tuple:
        windows, plan = list(self.windows), self.plan
        if plan.kind == "relpos":
            return *pads, *self.tables, windows, plan.scale, self.backend
        turned = [None, None]
        if plan.kind == "rope" and self.windows.pads:
            turned = [pad_rows(table, self.windows) for table in self.tables]
        return *pads, *turned, plan.halves, windows, plan.scale, self.backend
