# SPDX-License-Identifier: Apache-2.0
"""What all layers of one encoder need is made in one operation, at the start of its forward.

Each layer is handed its share for the length of that forward. A layer that is called alone, or
recomputed by a checkpoint, makes its own.
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
    """Mixin of a layer whose share an ``EncoderForward`` makes.

    given: the share, None outside the encoder's forward   stamp: of the tensors it was made of. An
        interrupt leaves a share behind, for hooks do not run then; once a tensor has changed it is
        not taken. Copies and pickles have none.
    """

    given: Share | None = None
    stamp: tuple = ()

    def sources(self) -> Sequence[Tensor]:
        """The tensors of this layer and of the model that its share is made of."""
        raise NotImplementedError

    def alone(self) -> Share:
        """This layer's share, made for it alone."""
        raise NotImplementedError

    def share(self) -> Share:
        """What was made for all layers where that is at hand, to the same bits."""
        given = self.given
        if given is None or self.stamp != stamp(self.sources()):
            return self.alone()
        if not torch.is_grad_enabled():
            return given
        sources = self.sources()
        if given[0].requires_grad:
            return _Given.apply(len(given), *given, *sources)
        # Made under no_grad or in inference mode, by a prediction in another thread.
        made_apart = given[0].is_inference() or any(t.requires_grad for t in sources)
        return self.alone() if made_apart else given

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": None, "stamp": ()}


def stamp(tensors: Sequence[Tensor]) -> tuple:
    """Another one once a tensor is replaced, moved or written to; () while a graph is traced."""
    if torch.compiler.is_compiling() or any(_without_memory(t) for t in tensors):
        return ()
    return tuple((id(t), t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)


def _without_memory(t: Tensor) -> bool:
    return t.is_meta or is_fake(t) or torch._C._functorch.is_functorch_wrapped_tensor(t)


class _Given(torch.autograd.Function):
    """What was made for all layers, for one of them.

    It saves what making it alone saves, so that a checkpoint may record the one and recompute the
    other: of a recomputation only the saved tensors are used.
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
    """Hooks of one encoder. Copies and pickles go with the model."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = list(layers)

    def together(self) -> bool:
        """Whether one operation can serve all layers."""
        raise NotImplementedError

    def make(self) -> Sequence[Share]:
        """The share of each layer."""
        raise NotImplementedError

    def install(self, encoder: nn.Module) -> None:
        """Hook ``open`` and ``close`` to the encoder's forward."""
        encoder.register_forward_pre_hook(self.open)
        encoder.register_forward_hook(self.close, always_call=True)

    def open(self, encoder: nn.Module, args: Any) -> None:
        """Before the encoder's forward: give each layer its share."""
        if getattr(encoder, "_is_replica", False) or not self.together():
            return
        for layer, given in zip(self.layers, self.make(), strict=True):
            layer.given, layer.stamp = given, stamp(layer.sources())

    def close(self, encoder: nn.Module, args: Any, result: Any) -> None:
        """After the encoder's forward, also a failed one: take the shares back."""
        for layer in self.layers:
            layer.given = None
