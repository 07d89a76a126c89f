# SPDX-License-Identifier: Apache-2.0
"""A branch next to the block's MLP, in both directions: adapt_former's, on n = norm2(x1)."""

import torch
from torch import Tensor

from samfast.kernels._common.ranges import stage
from samfast.kernels.adapt_former import engine
from samfast.kernels.sam_block.plan import SidePlan


class Side:
    """The tensors and options of the branch; n is (tokens, features), of the products' dtype.

    needs, grads: which of its tensors want a gradient, and what a backward has made for them
    """

    def __init__(self, plan: SidePlan, tensors, backend: str, needs):
        self.plan, self.backend, self.needs = plan, backend, list(needs)
        *self.norm, self.down, self.down_bias, self.up, self.up_bias, self.seed = tensors
        self.grads: list[Tensor | None] = [None] * len(tensors)

    @property
    def need_low(self) -> bool:
        """Whether a tensor before z wants a gradient."""
        return any(self.needs[:4])

    def forward(self, n: Tensor) -> Tensor:
        """z (tokens, bottleneck), what the backward keeps of the branch."""
        path = engine.path_of(self.backend, n, len(self.down), n.dtype)
        with stage("sam_block", "side"):
            return path.low(
                n, *self.norm, self.down, self.down_bias, self.plan.eps, self.plan.dropout,
                self.seed, n.dtype,
            )  # fmt: skip

    def bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The bias of lin2 with that of the up-projection, rounded once."""
        if bias is None:
            return self.up_bias
        return torch.add(bias, self.up_bias, out=bias.new_empty(bias.shape, dtype=dtype))

    def add_(self, update: Tensor, z: Tensor) -> None:
        """update += z upᵀ."""
        with stage("sam_block", "side"):
            engine.add_up_(engine.up_path_of(self.backend, z, self.up), update, z, self.up)

    def back_to_z(self, dupdate: Tensor, z: Tensor, need_n: bool) -> Tensor | None:
        """Everything that follows from dupdate; returns dz if it is needed."""
        with stage("sam_block", "side"):
            return self._back_to_z(dupdate, z, need_n)

    def _back_to_z(self, dupdate, z, need_n):
        if self.needs[5]:
            self.grads[5] = engine.column_sum(dupdate, self.up_bias)
        if not (need_n or self.need_low or self.needs[4]):
            return None
        path = engine.up_path_of(self.backend, z, self.up)
        dz, self.grads[4] = engine.up_backward(path, dupdate, z, self.up, self.needs[4])
        return dz

    def back_to_n(self, dn: Tensor | None, dz: Tensor, z: Tensor, n: Tensor) -> None:
        """The gradients of what stands before z, and n's, which is added to dn."""
        path = engine.path_of(self.backend, n, len(self.down), n.dtype)
        with stage("sam_block", "side"):
            _, *grads, dbias = path.low_backward(
                dn, dz, z, n, *self.norm, self.down, self.plan.eps, self.plan.dropout,
                [dn is not None, *self.needs[:4]],
            )  # fmt: skip
        self.grads[:4] = [*grads, None if dbias is None else dbias.to(self.down_bias.dtype)]
