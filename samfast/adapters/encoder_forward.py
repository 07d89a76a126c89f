# SPDX-License-Identifier: Apache-2.0
"""Compute what all layers of an encoder need in one operation, when its forward starts.

Each layer receives its share for the duration of that forward. A layer that runs on its own, or in
a checkpoint's recomputation, computes its share itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

if TYPE_CHECKING:
    from samfast.adapters.adapter import Adapter

    _Mixin = Adapter
else:
    _Mixin = nn.Module

Share = tuple[Tensor, ...]
Layer = TypeVar("Layer", bound="SharingLayer")


class SharingLayer(_Mixin):
    """Mixin of a layer whose share an ``EncoderForward`` computes.

    given: the share; None outside the encoder's forward
    stamp: identifies the tensors that the share was computed from. An interrupt skips the hooks and
        leaves a share behind; the stamp tells when it is stale. Copies and pickles hold no share.
    """

    given: Share | None = None
    stamp: tuple = ()

    def sources(self) -> Sequence[Tensor]:
        """The tensors of this layer and of the model that its share depends on."""
        raise NotImplementedError

    def alone(self) -> Share:
        """Compute the share of this layer only."""
        raise NotImplementedError

    def share(self) -> Share:
        """Return the share computed for all layers if it is current, else compute the same bits."""
        given = self.given
        if given is None or self.stamp != stamp(self.sources()):
            return self.alone()
        if not torch.is_grad_enabled():
            return given
        sources = self.sources()
        if given[0].requires_grad:
            return _Given.apply(len(given), *given, *sources)
        # Another thread that predicts computed it under no_grad or in inference mode.
        made_apart = given[0].is_inference() or any(t.requires_grad for t in sources)
        return self.alone() if made_apart else given

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": None, "stamp": ()}


def stamp(tensors: Sequence[Tensor]) -> tuple:
    """Return a stamp that changes when a tensor is replaced, moved or written; () in a trace."""
    if torch.compiler.is_compiling() or any(_without_memory(t) for t in tensors):
        return ()
    return tuple((id(t), t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)


def _without_memory(t: Tensor) -> bool:
    return t.is_meta or is_fake(t) or torch._C._functorch.is_functorch_wrapped_tensor(t)


class _Given(torch.autograd.Function):
    """Hand one layer its part of what was computed for all layers.

    It saves the same tensors as computing the share alone. A checkpoint may thus record one way and
    recompute the other: it takes only the saved tensors from a recomputation.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Share:
        ctx.save_for_backward(*tensors[count:])
        ctx.others = len(tensors) - count
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads, *[None] * ctx.others


class EncoderForward(Generic[Layer]):
    """The hooks of one encoder. Copies and pickles of the model include them."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = list(layers)

    def together(self) -> bool:
        """True if one operation can serve all layers."""
        raise NotImplementedError

    def make(self) -> Sequence[Share]:
        """Compute the share of each layer."""
        raise NotImplementedError

    def install(self, encoder: nn.Module) -> None:
        """Register ``open`` and ``close`` as hooks of the encoder's forward."""
        encoder.register_forward_pre_hook(self.open)
        encoder.register_forward_hook(self.close, always_call=True)

    def open(self, encoder: nn.Module, args: Any) -> None:
        """Give each layer its share, before the encoder's forward."""
        if getattr(encoder, "_is_replica", False) or not self.together():
            return
        for layer, given in zip(self.layers, self.make(), strict=True):
            layer.given, layer.stamp = given, stamp(layer.sources())

    def close(self, encoder: nn.Module, args: Any, result: Any) -> None:
        """Take the shares back, after the encoder's forward, even a failed one."""
        for layer in self.layers:
            layer.given = None
