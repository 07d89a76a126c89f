# SPDX-License-Identifier: Apache-2.0
"""The loss term of adapters, taken from their latest forward.

A layer's term is part of the graph of its forward, so autograd finds its gradient. Reentrant
checkpointing is the exception: the forward runs without a graph, and its recomputation has one.
``aux_loss`` then returns the term under a node of its own. That node is newer than the model's, so
autograd runs it first. It leaves the incoming gradient with the layers, and each layer's
recomputation passes the gradient on into its own graph.
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
    """Sum the terms of layers that will be recomputed; backward leaves its gradient with them.

    anchor: any tensor that requires a gradient, so that autograd makes a node; it gets no gradient
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
    """Raise RuntimeError if this backward left a layer without its recomputation."""
    lost = 0
    for gradient in left:
        lost += len(gradient)
        gradient.clear()
    if lost:
        raise RuntimeError(
            f"the gradient of aux_loss did not reach {lost} of {len(left)} layers: their forward "
            "ran without a graph, and this backward did not recompute it afterwards; pass "
            "use_reentrant=False to the checkpoint, or call aux_loss after the forward, add it to "
            "the loss of the same backward and let the checkpoint's input require a gradient; run "
            "later forwards under no_grad in eval()"
        )


def _sum_of(terms: list[LatestLoss]) -> Tensor:
    return _sum([term.value for term in terms if term.value is not None])


def _sum(values: list[Tensor]) -> Tensor:
    device = values[0].device
    return torch.stack([value.to(device) for value in values]).sum()


def _joint_loss(model: nn.Module, layers: list[Adapter]) -> Tensor:
    """Return the terms that depend only on parameters; zero for methods without one."""
    kinds = {type(layer): layer for layer in layers}
    every = [kind.joint_loss([m for m in layers if type(m) is kind]) for kind in kinds]
    found = [term for term in every if term is not None]
    if found:
        return _sum(found)
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)


def aux_loss(model: nn.Module) -> Tensor:
    """Sum the loss terms that the adapters' latest forward left. Add it with weight 1.

    Conv-LoRA's term is the gates' balancing loss, its coefficient included; in eval it is constant.
    TA-LoRA's term is the penalty that keeps its factors orthogonal; it needs no forward. Other
    methods have no term and count as zero.

    Call it after every forward of training, before the backward. If a layer runs twice in a
    forward, its last call counts. It works with both kinds of checkpointing, gradient
    accumulation, DistributedDataParallel and torch.compile.

    Reentrant checkpoints have more conditions. Call aux_loss after each forward. Put its term in
    the same backward as a loss that reaches every layer. Call no layer twice, and compile no module
    inside. Anything else raises RuntimeError; ``use_reentrant=False`` has no such limits.

    Raises ValueError if the model has no adapter, and RuntimeError if no forward ran yet.
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
            f"expected a forward before aux_loss, but this {type(model).__name__} ran none; "
            "run it first"
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
            f"a layer ran {repeated} training forwards without a graph since the last aux_loss, "
            "and a reentrant checkpoint cannot tell them apart; call aux_loss after each forward, "
            "run forwards under no_grad in eval(), or pass use_reentrant=False"
        )
    others = [term.value for term in terms if term.value is not None and not term.blind]
    if blind:
        device = next(term.value.device for term in blind if term.value is not None)
        anchor = torch.zeros((), device=device, requires_grad=True)
        others.append(_Leave.apply(anchor, blind))
    return _sum(others) if len(others) > 1 or not blind else others[0]
