# SPDX-License-Identifier: Apache-2.0
"""Find the file here that knows the adapter layers of another library.

A library is known by the names of its classes. It is never imported here: the model's own code has
done that. Classes that programs copy from each other are known by their bare name. Each file has

    OWNER                the library's name; None if it is the package of the class
    CALLS                the library's own calls for what samfast does with its adapters
    objection(module)    why the module's class is left alone; None if samfast knows it
    mixin_of(module)     the mixin that fuses a module of a known class
    kind_of(module)      the library's name for the layer
    parameters(module)   (name, Parameter) of what the adapter adds
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

from torch import nn

from samfast.adapters.foreign import Foreign
from samfast.adapters.stand_in import altered, bare_kind, whose
from samfast.integrations.swap import swapped

LIBRARIES = {  # class -> its file
    "peft.tuners.tuners_utils.BaseTunerLayer": "peft_layers",
    "autogluon.multimodal.models.adaptation_layers.ConvLoRALinear": "autogluon",
    "micro_sam.models.peft_sam.FacTSurgery": "micro_sam",
    "micro_sam.models.peft_sam.ScaleShiftLayer": "micro_sam",
}
COPIED = {  # class of any package -> its file, and a child or a parameter that it has
    "ConvLoRALinear": ("autogluon", "lora_moe_gating"),
    "_LoRA_qkv": ("qkv_wrappers", "qkv"),
    "_LoRA_qkv_relation_add": ("cobot", "qkv"),
    "Adapter": ("cobot", "adapter_layer_norm_before"),
    "Adapter_relation": ("cobot", "adapter_layer_norm_before"),
    "QKVLinear": ("mtsam", "td_G"),
    "TDLinear": ("mtsam", "td_G"),
    "AttentionLoRA": ("micro_sam", "qkv_proj"),
    "MLPLoRA": ("micro_sam", "mlp_layer"),
    "AdaptFormer": ("micro_sam", "mlp_proj"),
}


class Library(Protocol):
    """The functions and constants of such a file."""

    OWNER: str | None
    CALLS: Mapping[str, str]

    def objection(self, module: nn.Module) -> str | None: ...

    def mixin_of(self, module: nn.Module) -> type: ...

    def kind_of(self, module: nn.Module) -> str: ...

    def parameters(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]: ...


def library_of(module: nn.Module) -> Library | None:
    """Return the file that knows the module's class; None for samfast's, torch's and unknown."""
    for base in type(module).__mro__:
        file = LIBRARIES.get(f"{base.__module__}.{base.__qualname__}")
        own = base.__module__.partition(".")[0] == "samfast"
        if file is None and base.__name__ in COPIED and not own:
            copied, part = COPIED[base.__name__]
            file = copied if _holds(module, part) else None
        if file is not None:
            return cast(Library, importlib.import_module(f"samfast.integrations.{file}"))
    return None


def _holds(module: nn.Module, part: str) -> bool:
    """Say if it has such a child or parameter, also one that torch computes at each read."""
    computed = module._modules.get("parametrizations")
    stores: list[Mapping[str, object]] = [module._modules, module._parameters]
    if computed is not None:
        stores.append(computed._modules)
    return any(store.get(part) is not None for store in stores)


def _known(module: nn.Module) -> Library:
    """Return that file for a module that a library adapted."""
    library = library_of(module)
    assert library is not None, type(module)
    return library


def owner_of(module: nn.Module) -> str:
    """Name the owner of a layer that another library adapted."""
    package = bare_kind(module).__module__.partition(".")[0]
    return _known(module).OWNER or ("your program" if package == "__main__" else package)


def described(module: nn.Module) -> str:
    """Name the owner of such a layer and what the owner calls it."""
    return f"{whose(owner_of(module))} {_known(module).kind_of(module)}"


def layers_of_others(model: nn.Module) -> dict[str, nn.Module]:
    """Map full names to the layers that other libraries adapted."""
    return {name: m for name, m in model.named_modules() if library_of(m) is not None}


def fusable(module: nn.Module) -> type | None:
    """Return the mixin that fuses the module; None if there is none or it is fused already."""
    library = library_of(module)
    if library is None or swapped(module) is not None or "forward" in vars(module):
        return None
    return library.mixin_of(module) if library.objection(module) is None else None


def parameters_of_others(layers: dict[str, nn.Module]) -> set[str]:
    """Return the full names of all tensors that other libraries added."""
    return {
        f"{layer}.{name}" if layer else name
        for layer, module in layers.items()
        for name, _ in _known(module).parameters(module)
    }


def states_of_others(layers: dict[str, nn.Module]) -> dict[str, str]:
    """Say how each of these layers runs: "fused: …" or "not fused: …", with owner and reason."""
    return {name: _state(module) for name, module in layers.items()}


def _state(module: Foreign) -> str:
    library = _known(module)
    what = described(module)
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
    """Raise ValueError if another library has adapted a layer."""
    for name, module in layers_of_others(model).items():
        raise ValueError(
            f"{name or 'the model'} already has an adapter, {described(module)}; "
            f"{_known(module).CALLS['keep']}"
        )


def call_of_owner(model: nn.Module, action: str) -> str | None:
    """Say what to do instead, if the adapters of a model are another library's.

    action: "save", "merge" or "loss"
    """
    for module in layers_of_others(model).values():
        call, kind = _known(module).CALLS[action], type(model).__name__
        return f"the adapters of this {kind} are {whose(owner_of(module))}; {call}"
    return None
