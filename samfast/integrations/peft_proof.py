# SPDX-License-Identifier: Apache-2.0
"""Prove that a class is PEFT's ``lora.Linear`` and computes LoRA, whatever its version."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.integrations.probe import apart, difference, shell
from samfast.integrations.swap import foreign_method, methods_of, own_method

_LAYER = "peft.tuners.lora.layer"
_NAME, _SCALING = "probe", 0.75
_verdicts: dict[tuple, str | None] = {}


def objection(module: nn.Module) -> str | None:
    """Say why the module's class is left alone; None if it is PEFT's and a run gives LoRA.

    Its forward must be PEFT's: a replacement may do more than a run shows.
    """
    kind = type(module)
    if kind.__module__ != _LAYER or kind.__qualname__ != "Linear":
        return "which samfast does not know"
    methods = methods_of(kind)
    if (method := foreign_method(kind) or own_method(module, methods)) is not None:
        return f"whose {method} was replaced"
    key = kind, tuple(methods.values())
    if key not in _verdicts:
        _verdicts[key] = apart(lambda: _probed(module))
    return _verdicts[key]


def _probed(module: nn.Module) -> str | None:
    """Say how a module of that class, with layers of its own, differs from the formula."""
    x = torch.rand(3, 6)
    problem = difference(_stand_in(module), _formula, x)
    return None if problem is None else f"but {problem}"


def _stand_in(module: nn.Module) -> nn.Module:
    """Make a module with one adapter; copy PEFT's other attributes, or leave them empty."""
    own = vars(nn.Module())
    values = {name: value for name, value in vars(module).items() if name not in own}
    values |= {"scaling": {_NAME: _SCALING}, "_active_adapter": [_NAME], "merged_adapters": []}
    values |= {"use_dora": {_NAME: False}, "lora_variant": {}}
    values |= {"_disable_adapters": False, "lora_bias": {_NAME: False}, "fan_in_fan_out": False}
    layers = {
        "lora_A": nn.Linear(6, 2, bias=False),
        "lora_B": nn.Linear(2, 5, bias=False),
        "lora_dropout": nn.Identity(),
    }
    kinds = nn.ModuleDict, nn.ParameterDict
    parts = {n: type(part)() for n, part in module.named_children() if isinstance(part, kinds)}
    parts |= {name: nn.ModuleDict({_NAME: layer}) for name, layer in layers.items()}
    return shell(type(module), values, base_layer=nn.Linear(6, 5), **parts)


def _formula(x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    base = F.linear(x, given["base_layer.weight"], given["base_layer.bias"])
    low = F.linear(x, given[f"lora_A.{_NAME}.weight"])
    return base + _SCALING * F.linear(low, given[f"lora_B.{_NAME}.weight"])
