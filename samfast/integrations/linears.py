# SPDX-License-Identifier: Apache-2.0
"""The plain linear layers inside wrappers of other libraries, and what stands against them.

Sentences are the rest of one that begins with the module that has the layers.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from samfast.adapters.block_layer import BlockLayer, foreign_tensor
from samfast.adapters.foreign import Foreign
from samfast.adapters.stand_in import altered, kind_of
from samfast.functional import lora_linear
from samfast.kernels._common.autocast import autocast_dtype
from samfast.kernels._common.windows import Windows
from samfast.kernels.sam_block.plan import LayerPlan

_NO_HOOKS: Mapping[int, Callable[..., Any]] = MappingProxyType({})


def stamp(module: nn.Module, *numbers: str) -> tuple[Any, ...]:
    """What tells the module's build from another's: quick to ask, so that it is asked often.

    numbers: attributes that the formula depends on
    """
    children = layers_stamp(module._modules)
    own = [name for name, value in module._parameters.items() if value is not None]
    buffers = [name for name, value in module._buffers.items() if value is not None]
    return children, tuple(own), tuple(buffers), *[_number(module, name) for name in numbers]


def layers_stamp(layers: Mapping[str, nn.Module | None]) -> tuple[Any, ...]:
    """What tells the builds of layers apart: name, shape and bias, or the class."""
    found: list[tuple[Any, ...]] = []
    for name, layer in layers.items():
        if type(layer) is nn.Linear:
            found.append((name, weight_of(layer).shape, layer._parameters.get("bias") is None))
        else:
            found.append((name, type(layer)))
    return tuple(found)


def weight_of(layer: Foreign) -> Tensor:
    """Quicker than by attribute, which is where replicas of DataParallel have it."""
    weight = layer._parameters.get("weight")
    return layer.weight if weight is None else weight


def _number(module: nn.Module, name: str) -> tuple[Any, ...]:
    value = vars(module).get(name)
    plain = isinstance(value, (bool, int, float))
    return (type(value), value) if plain else (type(value),)


def held_problem(
    module: nn.Module, children: tuple[str, ...], parameters: tuple[str, ...] = ()
) -> str | None:
    """What the module itself has in addition to these children and parameters, or lacks.

    parameters: that it may have, or not
    """
    for what, store, known in (
        ("child", module._modules, children),
        ("parameter", module._parameters, parameters),
        ("buffer", module._buffers, ()),
    ):
        held = [name for name, value in store.items() if value is not None]
        if more := [name for name in held if name not in known]:
            return f"has a {what} {more[0]}, which would be left out"
    absent = [name for name in children if module._modules.get(name) is None]
    return f"has no {absent[0]}" if absent else None


def held(module: nn.Module) -> dict[str, nn.Module]:
    """The module's children by name."""
    return {name: child for name, child in module._modules.items() if child is not None}


def kinds_problem(layers: Mapping[str, nn.Module]) -> str | None:
    """Which of the layers is not a plain linear one."""
    for name, layer in layers.items():
        if type(layer) is not nn.Linear:
            return f"has {kind_of(layer)} as {name}, not a plain nn.Linear"
        if weight_of(layer).dim() != 2:  # as a shard may be
            return f"has a weight of shape {tuple(weight_of(layer).shape)} in {name}"
    return None


def pair_problem(
    name: str, base: nn.Linear, outputs: int, down: nn.Linear, up: nn.Linear
) -> str | None:
    """Why down and up are not a low-rank update of that many of the base's outputs."""
    if down.bias is not None or up.bias is not None:
        return f"has a bias in its update of {name}"
    rank, inputs = up.weight.shape[1], base.weight.shape[1]
    shapes = tuple(down.weight.shape), tuple(up.weight.shape)
    if shapes != ((rank, inputs), (outputs, rank)) or rank == 0:
        return (
            f"has an update of {name} of shapes {shapes[0]} and {shapes[1]}, which does not take "
            f"{inputs} features to {outputs}"
        )
    return None


def mlp_problem(mlp: nn.Module, name: str, needed: tuple[str, ...]) -> str | None:
    """What an MLP lacks of the children that are read from it."""
    for part in needed:
        if mlp._modules.get(part) is None or hasattr(type(mlp), part):
            return f"has a {name} without a child {part}"
    return None


def now_problem(layers: Mapping[str, nn.Module | None]) -> str | None:
    """What stands against the layers at the moment, of which there is at least one."""
    dtypes = set()
    for name, layer in layers.items():
        if layer is None:
            continue
        weight = weight_of(layer)
        if altered(layer):
            return f"has hooks or a forward of its own on {name}"
        if foreign_tensor(weight):
            return f"has a weight in {name} that is a {type(weight).__name__}"
        dtypes.add(weight.dtype)
    if len(dtypes) == 1:
        return None
    if autocast_dtype(weight.device.type) is not None and torch.float64 not in dtypes:
        return None
    names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"has layers of {' and '.join(names)}"


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x has the weight's dtype; the owner's forward says what is wrong with another."""
    return x.dtype == weight.dtype or autocast_dtype(x.device.type) is not None


class UpdatedLinear:
    """A linear layer and its low-rank update, which a wrapper holds apart, as one layer.

    x: (..., in_features) -> (..., out_features) = x Wᵀ + b + x Aᵀ Bᵀ

    A fused block asks it what it asks of a module; hooks are its owner's business.
    """

    _forward_hooks = _forward_pre_hooks = _backward_hooks = _backward_pre_hooks = _NO_HOOKS

    def __init__(self, base: nn.Linear, down: nn.Linear, up: nn.Linear):
        self.weight, self.bias = base.weight, base.bias
        self.lora_a, self.lora_b = down.weight, up.weight

    def __call__(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.bias, self.lora_a, self.lora_b, 1.0)

    def block_problem(self) -> None:
        """None: what stands against the layer is said by its wrapper."""
        return None

    def block_layer(self, x: Tensor, windows: Windows) -> BlockLayer:
        """The layer's part in a fused block."""
        tensors = self.weight, self.bias, self.lora_a, self.lora_b
        return BlockLayer(*tensors, LayerPlan(adapted=True))
