# SPDX-License-Identifier: Apache-2.0
"""The term of the loss that a layer's latest forward left behind."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LatestLoss:
    """A layer's term of its latest forward. Copies and pickles are empty.

    value: scalar, None before the first forward
    blind: how many forwards of training ran without a graph, one after another; 0 when the latest
        had one, so that no recomputation follows
    counted: ``aux_loss`` has asked since, or a backward ran them again: the next one is the first
    trained: whether the term reaches a parameter of its own layer
    gradient: [d loss / d value], for that recomputation, which takes it out of the list
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.blind = 0
        self.counted = False
        self.trained = False
        self.gradient: list[Tensor] = []

    def __reduce__(self) -> tuple[type["LatestLoss"], tuple[()]]:  # deepcopy asks it too
        return type(self), ()

    def keep(self, value: Tensor, y: Tensor, training: bool, trained: bool) -> Tensor:
        """Take the term of a forward whose result is y; returns y, which the caller gives back.

        training: False when the term is constant   trained: whether it reaches a parameter
        """
        if torch.compiler.is_exporting():  # what stands for a tensor there outlives the export
            return y
        if recomputing():
            self.counted = True  # the forwards before this backward are done with
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
    """Whether this forward is a checkpoint's second one, in the middle of a backward."""
    if torch.compiler.is_compiling():  # checkpoints inside a compiled graph recompute no Python
        return False
    return torch._C._current_graph_task_id() != -1


class _SendOn(torch.autograd.Function):
    """y, unchanged; its backward also gives ``value`` a gradient that came another way."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        # Not through save_for_backward: a checkpoint inside a checkpoint counts what is saved, and
        # only one of its two forwards comes by here. The gradient has no graph that could leak.
        ctx.gradient = gradient.to(value.device)
        ctx.set_materialize_grads(False)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor, None]:
        return dy, ctx.gradient, None
