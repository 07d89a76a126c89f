# SPDX-License-Identifier: Apache-2.0
"""Layers of other libraries that adapt a model, and which file here knows them.

A library is known by names of classes. It is never imported: a model that has its layers did that.
Each file has

    OWNER, CALLS         the library's name; its own calls for what samfast does with its adapters
    objection(module)    why the module's class is left alone, None where samfast knows it
    mixin_of(module)     what fuses a module of a class that samfast knows
    kind_of(module)      what the library calls the layer
    parameters(module)   (name, Parameter) of what the adapter adds
"""

import importlib
from types import ModuleType

from torch import nn

from samfast.adapters.stand_in import altered
from samfast.integrations.swap import swapped

LIBRARIES = {"peft.tuners.tuners_utils.BaseTunerLayer": "peft_layers"}  # a class: its file


def library_of(kind: type[nn.Module]) -> ModuleType | None:
    """The file that knows modules of this class, None for samfast's, torch's and unknown ones."""
    for base in kind.__mro__:
        file = LIBRARIES.get(f"{base.__module__}.{base.__qualname__}")
        if file is not None:
            return importlib.import_module(f"samfast.integrations.{file}")
    return None


def layers_of_others(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that another library adapted, by full name."""
    return {name: m for name, m in model.named_modules() if library_of(type(m)) is not None}


def fusable(module: nn.Module) -> type | None:
    """The mixin that fuses the module; None where there is none, or it has its class already."""
    library = library_of(type(module))
    if library is None or swapped(module) is not None or "forward" in vars(module):
        return None
    return library.mixin_of(module) if library.objection(module) is None else None


def parameters_of_others(layers: dict[str, nn.Module]) -> set[str]:
    """Full names of every tensor that other libraries added."""
    return {
        f"{layer}.{name}" if layer else name
        for layer, module in layers.items()
        for name, _ in library_of(type(module)).parameters(module)
    }


def states_of_others(layers: dict[str, nn.Module]) -> dict[str, str]:
    """How each of these layers runs: "fused: …" or "not fused: …", with whose it is and why."""
    return {name: _state(module) for name, module in layers.items()}


def _state(module: nn.Module) -> str:
    library = library_of(type(module))
    what = f"{library.OWNER}'s {library.kind_of(module)}"
    if swapped(module) is None:
        if "forward" in vars(module):
            return f"not fused: {what} with a forward that was replaced; undo that, then fuse"
        if (reason := library.objection(module)) is not None:
            return f"not fused: {what}, {reason}"
        return f"not fused: {what}; fuse it with samfast.fuse(model)"
    if altered(module):
        return f"not fused: {what} has hooks or a forward of its own; remove them to fuse it"
    problem = module.block_problem()
    return f"fused: {what}" if problem is None else f"not fused: {what} {problem}"


def refuse_others(model: nn.Module) -> None:
    """Raise ValueError where another library has adapted a layer."""
    for name, module in layers_of_others(model).items():
        library = library_of(type(module))
        raise ValueError(
            f"{name or 'the model'} already has an adapter, {library.OWNER}'s "
            f"{library.kind_of(module)}; {library.CALLS['keep']}"
        )


def call_of_owner(model: nn.Module, action: str) -> str | None:
    """What to do instead, where the adapters of a model are another library's.

    action: "save", "merge" or "loss"
    """
    for module in layers_of_others(model).values():
        library = library_of(type(module))
        kind = type(model).__name__
        return f"the adapters of this {kind} are {library.OWNER}'s; {library.CALLS[action]}"
    return None
