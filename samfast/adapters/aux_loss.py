# SPDX-License-Identifier: Apache-2.0
"""The term that adapters add to the loss of a step, taken from their latest forward.

A layer's term is part of the graph of its forward, so its gradient comes by itself, except under
reentrant checkpointing: there the forward runs without a graph, and a later recomputation has one.
``aux_loss`` then hands the term out under a node of its own. That node was made after the model's,
so autograd runs it before them; it leaves the incoming gradient with the layers, and each layer's
recomputation sends the gradient on into its own graph.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samfast.adapters.adapter import Adapter, adapters
from samfast.adapters.attachment import attachment_within
from samfast.adapters.latest_loss import LatestLoss
from samfast.adapters.wrappers import unwrapped
from samfast.integrations.libraries import call_of_owner


class _Leave(torch.autograd.Function):
    """Sum of the terms of layers that will be recomputed; its gradient is left with them.

    anchor: any tensor that requires a gradient, so that autograd makes a node; it gets none.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, latest: list[LatestLoss]) -> Tensor:
        ctx.latest = latest
        return _sum_of(latest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        left = []
        for term in ctx.latest:
            term.gradient = [gradient]
            if term.trained:  # a frozen layer may lie before all that is trained
                left.append(term.gradient)
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: _check_all_taken(left))
        return None, None


def _check_all_taken(left: list[list[Tensor]]) -> None:
    """At the end of a backward: every layer was recomputed, and after its gradient came."""
    lost = 0
    for gradient in left:
        lost += len(gradient)
        gradient.clear()
    if lost:
        raise RuntimeError(
            f"the gradient of aux_loss did not reach {lost} of {len(left)} layers, whose forward "
            "ran without a graph and which this backward did not recompute after it; under "
            "reentrant checkpointing call aux_loss after the forward, add it to the loss of the "
            "same backward and let the checkpoint's input require a gradient, or use "
            "use_reentrant=False; a later forward under no_grad belongs into eval()"
        )


def _sum_of(terms: list[LatestLoss]) -> Tensor:
    return _sum([term.value for term in terms if term.value is not None])


def _sum(values: list[Tensor]) -> Tensor:
    device = values[0].device
    return torch.stack([value.to(device) for value in values]).sum()


def _joint_loss(model: nn.Module, layers: list[Adapter]) -> Tensor:
    """By the layers' parameters alone; zero for methods that have no such term."""
    kinds = {type(layer): layer for layer in layers}
    every = [kind.joint_loss([m for m in layers if type(m) is kind]) for kind in kinds]
    found = [term for term in every if term is not None]
    if found:
        return _sum(found)
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)


def aux_loss(model: nn.Module) -> Tensor:
    """What the adapters add to the loss: the sum over layers of their latest forward's term.

    Conv-LoRA's is the gates' balancing loss, its coefficient included, TA-LoRA's the penalty that
    keeps its factors orthogonal, which needs no forward; add it to the task's loss with weight 1.
    Zero for methods that have none. Call it after every forward of training, before
    the backward. A layer that is called twice in a forward counts with its last call. Both kinds
    of checkpointing, accumulation, DistributedDataParallel and torch.compile will do. In eval
    Conv-LoRA's is constant.

    Reentrant checkpoints ask for more: aux_loss after each forward, its term in the same backward
    as a loss that reaches every layer, no layer called twice, no compiled modules inside. What
    breaks this raises RuntimeError; ``use_reentrant=False`` has no such limits.

    Raises ValueError when the model has no adapter and RuntimeError when there was no forward yet.
    """
    model = unwrapped(model)
    layers = adapters(model)
    if not layers and attachment_within(model) is None:
        nothing = f"this {type(model).__name__} has no adapter; samfast.attach adds one"
        raise ValueError(call_of_owner(model, "loss") or nothing)
    terms = [t for layer in layers.values() if (t := layer.latest_loss()) is not None]
    if not terms:
        return _joint_loss(model, list(layers.values()))
    terms = [term for term in terms if term.value is not None]
    if not terms:
        raise RuntimeError(
            f"aux_loss belongs to a forward, and this {type(model).__name__} had none yet"
        )
    if not torch.is_grad_enabled():
        return _sum_of(terms)
    blind = [term for term in terms if term.blind]
    repeated, trained = max(term.blind for term in terms), any(term.trained for term in terms)
    for term in blind:
        term.counted = True
    if not trained:
        return _sum_of(terms)
    if repeated > 1:
        raise RuntimeError(
            f"a layer ran {repeated} forwards of training without a graph since aux_loss was last "
            "asked, and a reentrant checkpoint cannot tell them apart; call aux_loss after each "
            "forward, put forwards under no_grad into eval(), or use use_reentrant=False"
        )
    others = [term.value for term in terms if term.value is not None and not term.blind]
    if blind:
        device = next(term.value.device for term in blind if term.value is not None)
        anchor = torch.zeros((), device=device, requires_grad=True)
        others.append(_Leave.apply(anchor, blind))
    return _sum(others) if len(others) > 1 or not blind else others[0]
