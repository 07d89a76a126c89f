# SPDX-License-Identifier: Apache-2.0
"""Check and read the plain linear layers inside other libraries' wrappers.

Sentences here are the end of one that starts with the module that has the layers.
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

_PLAIN = (bool, int, float, str, list, tuple)
_NO_HOOKS: Mapping[int, Callable[..., Any]] = MappingProxyType({})


def stamp(module: nn.Module, *numbers: str) -> tuple[Any, ...]:
    """Return a mark that differs between builds of a module; it is quick, since asked often.

    numbers: attributes that the formula depends on
    """
    children = layers_stamp(module._modules)
    own = [name for name, value in module._parameters.items() if value is not None]
    buffers = [name for name, value in module._buffers.items() if value is not None]
    return children, tuple(own), tuple(buffers), *[_number(module, name) for name in numbers]


def layers_stamp(layers: Mapping[str, nn.Module | None]) -> tuple[Any, ...]:
    """Return a mark of layers' builds: name, shape and bias, or the class."""
    found: list[tuple[Any, ...]] = []
    for name, layer in layers.items():
        if type(layer) is nn.Linear:
            found.append((name, weight_of(layer).shape, layer._parameters.get("bias") is None))
        else:
            found.append((name, type(layer)))
    return tuple(found)


def weight_of(layer: Foreign) -> Tensor:
    """Return the weight, faster than by attribute, where DataParallel's replicas have it."""
    weight = layer._parameters.get("weight")
    return layer.weight if weight is None else weight


def _number(module: nn.Module, name: str) -> tuple[Any, ...]:
    value = vars(module).get(name)
    plain = isinstance(value, (bool, int, float))
    return (type(value), value) if plain else (type(value),)


def held_problem(
    module: nn.Module, children: tuple[str, ...], parameters: tuple[str, ...] = ()
) -> str | None:
    """Say what the module has in addition to these children and parameters, or lacks.

    parameters: optional ones
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
    """Return the module's children by name."""
    return {name: child for name, child in module._modules.items() if child is not None}


def kinds_problem(layers: Mapping[str, nn.Module]) -> str | None:
    """Say which of the layers is not a plain linear one."""
    for name, layer in layers.items():
        if type(layer) is not nn.Linear:
            return f"has {kind_of(layer)} as {name}, not a plain nn.Linear"
        if weight_of(layer).dim() != 2:  # such as a shard
            return f"has a weight of shape {tuple(weight_of(layer).shape)} in {name}"
    return None


def pair_problem(
    name: str, base: nn.Linear, outputs: int, down: nn.Linear, up: nn.Linear
) -> str | None:
    """Say why down and up are not a low-rank update of that many outputs."""
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


def value_problem(module: object, wanted: Mapping[str, Any]) -> str | None:
    """Say which attribute does not have its value."""
    for name, value in wanted.items():
        found = getattr(module, name, None)
        alike = isinstance(found, bool) == isinstance(value, bool)
        if not (alike and isinstance(found, _PLAIN) and found == value):
            return f"has {name}={found!r}, not {value!r}"
    return None


def shape_problem(tensors: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> str | None:
    """Say which tensor is missing or has another shape than the one next to it."""
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            return f"has no {name}"
        if tuple(tensor.shape) != shape:
            return f"has a {name} of shape {tuple(tensor.shape)}, not {shape}"
    return None


def number_problem(name: str, value: object) -> str | None:
    """Say if an attribute is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"has a {name} that is a {type(value).__name__}, not a number"
    return None


def hook_problem(parts: Mapping[str, nn.Module]) -> str | None:
    """Say which part has hooks, or a forward of its own."""
    for name, part in parts.items():
        if altered(part):
            return f"has hooks or a forward of its own on {name}"
    return None


def kind_problem(name: str, part: nn.Module | None, kind: str) -> str:
    """Say that a part has another class."""
    return f"has {'none' if part is None else kind_of(part)} as {name}, not {kind}"


def dropout_problem(name: str, dropout: object, idle: bool) -> str | None:
    """Say why it is not a dropout; idle: True for a function that changes nothing."""
    if type(dropout) is nn.Dropout:
        if nn.Dropout.forward.__globals__.get("__name__") != nn.Dropout.__module__:
            return f"has a {name} whose class has another forward than torch's"
        return f"has a dropout of {dropout.p}" if dropout.p >= 1.0 else None
    if idle:
        return None
    return f"has a {name} that is neither nn.Dropout nor a function that changes nothing"


def mlp_problem(mlp: nn.Module, name: str, needed: tuple[str, ...]) -> str | None:
    """Say which child an MLP lacks, of those that are read."""
    for part in needed:
        if mlp._modules.get(part) is None or hasattr(type(mlp), part):
            return f"has a {name} without a child {part}"
    return None


def now_problem(layers: Mapping[str, nn.Module | None]) -> str | None:
    """Say what prevents fusing these layers now; there is at least one."""
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
    """True if x has the weight's dtype; for others the owner's forward raises the error."""
    return x.dtype == weight.dtype or autocast_dtype(x.device.type) is not None


class UpdatedLinear:
    """A linear layer and its low-rank update, as one layer; a wrapper holds them apart.

    x: (..., in_features) -> (..., out_features) = x Wᵀ + b + x Aᵀ Bᵀ

    A fused block asks it what it asks of a module. Hooks are left to the owner.
    """

    _forward_hooks = _forward_pre_hooks = _backward_hooks = _backward_pre_hooks = _NO_HOOKS

    def __init__(self, base: nn.Linear, down: nn.Linear, up: nn.Linear):
        self.weight, self.bias = base.weight, base.bias
        self.lora_a, self.lora_b = down.weight, up.weight

    def __call__(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.bias, self.lora_a, self.lora_b, 1.0)

    def block_problem(self) -> None:
        """Return None: the wrapper says what prevents fusing."""
        return None

    def block_layer(self, x: Tensor, windows: Windows) -> BlockLayer:
        """Return what the layer passes to a fused block."""
        tensors = self.weight, self.bias, self.lora_a, self.lora_b
        return BlockLayer(*tensors, LayerPlan(adapted=True))
