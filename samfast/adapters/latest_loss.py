# SPDX-License-Identifier: Apache-2.0
"""The loss term that a layer's latest forward left behind."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LatestLoss:
    """A layer's loss term from its latest forward. Copies and pickles are empty.

    value: scalar; None before the first forward
    blind: number of training forwards in a row that ran without a graph; 0 if the latest had one,
        since no recomputation follows then
    counted: True once ``aux_loss`` read the term or a backward recomputed these forwards; the next
        blind forward then counts as the first
    trained: True if the term reaches a parameter of its own layer
    gradient: [d loss / d value] for the recomputation, which pops it
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.blind = 0
        self.counted = False
        self.trained = False
        self.gradient: list[Tensor] = []

    def __reduce__(self) -> tuple[type["LatestLoss"], tuple[()]]:  # deepcopy calls it too
        return type(self), ()

    def keep(self, value: Tensor, y: Tensor, training: bool, trained: bool) -> Tensor:
        """Keep the term of a forward whose result is y; return y, for the caller to return.

        training: False if the term is constant   trained: True if it reaches a parameter
        """
        if torch.compiler.is_exporting():  # the tracer's tensors would outlive the export
            return y
        if recomputing():
            self.counted = True  # no forward before this backward counts any more
            if not self.gradient or not torch.is_grad_enabled():
                return y
            return _SendOn.apply(y, value, self.gradient.pop())
        self.value = value if training else value.detach()
        before = 0 if self.counted else self.blind
        self.blind = before + 1 if training and not torch.is_grad_enabled() else 0
        self.counted = False
        self.trained = trained
        self.gradient = []
        return y


def recomputing() -> bool:
    """True if this forward is a checkpoint's recomputation, during a backward."""
    if torch.compiler.is_compiling():  # inside a compiled graph, checkpoints rerun no Python
        return False
    return torch._C._current_graph_task_id() != -1


class _SendOn(torch.autograd.Function):
    """Return y unchanged; backward also passes ``value`` the gradient that was left for it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        # Not through save_for_backward: a nested checkpoint counts saved tensors, and only one of
        # its two forwards passes here. The gradient has no graph that could leak.
        ctx.gradient = gradient.to(value.device)
        ctx.set_materialize_grads(False)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor, None]:
        return dy, ctx.gradient, None
