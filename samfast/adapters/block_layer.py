# SPDX-License-Identifier: Apache-2.0
"""How a linear layer and its adapter enter the fused block.

An adapter takes part through two methods: ``block_problem()`` and ``block_layer(x, windows)``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from samfast.adapters.foreign import Foreign
from samfast.adapters.stand_in import altered, kind_of
from samfast.kernels._common.windows import Windows
from samfast.kernels.sam_block.plan import LayerPlan

_TORCH_FUNCTIONS = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]  # of a classmethod
    torch._C._disabled_torch_function_impl,
)
_TRACED = ("FunctionalTensor",)  # torch.export's


@dataclass(frozen=True)
class BlockLayer:
    """What one layer passes to one call of a fused block.

    seed: seed of the layer's dropout   params: tensors of its middle map
    keep: takes the map's aux output and the block's y, and returns y; None if the map has no aux
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    plan: LayerPlan = field(default_factory=LayerPlan)
    seed: Tensor | None = None
    params: tuple[Tensor, ...] = ()
    keep: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def tensors(self) -> list[Tensor | None]:
        """The layer's tensors, in the order that a fused block expects."""
        return [self.weight, self.bias, self.lora_a, self.lora_b, self.seed, *self.params]


def dropout_seed(dropout: float, x: Tensor) -> Tensor | None:
    """Draw one int64 seed on x's device; None without dropout."""
    if dropout == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def foreign_tensor(tensor: Tensor) -> bool:
    """True if torch's operations may mean something else on this tensor.

    That is so for a quantised tensor, and for one that overrides torch's functions. A tensor that
    FSDP shards is plain by the time of the forward.
    """
    kind = type(tensor)
    if kind is nn.Parameter or kind is Tensor:
        return False
    own = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    if own not in _TORCH_FUNCTIONS:
        return True
    return is_traceable_wrapper_subclass(tensor) and kind.__name__ not in ("DTensor", *_TRACED)


def layer_problem(name: str, layer: Foreign) -> str | None:
    """Say why the layer cannot take part in a fused block; None if it can."""
    if altered(layer):
        return f"{name} has hooks or a forward of its own"
    if type(layer) is nn.Linear:
        foreign = foreign_tensor(layer.weight)
        return f"{name} has a weight that is a {type(layer.weight).__name__}" if foreign else None
    if not hasattr(layer, "block_layer"):
        return f"{name} is {kind_of(layer)}, which does not say how to fuse it"
    if getattr(layer, "weight", None) is None:
        return f"{name} is {kind_of(layer)}, which has no weight"
    problem = layer.block_problem()
    return None if problem is None else f"{name} {problem}"


def block_layer(layer: Foreign, x: Tensor, windows: Windows) -> BlockLayer:
    """Return what a layer without a problem passes to the block; x is the products' input."""
    if type(layer) is nn.Linear:
        return BlockLayer(layer.weight, layer.bias)
    return layer.block_layer(x, windows)
