# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in the file format of Hugging Face PEFT, written and read without importing it.

PEFT puts ``base_model.model.`` in front of every tensor's name and adds ``.weight`` to lora_A and
lora_B. Modules that are trained whole ("modules_to_save") keep their own names after the prefix.
"""

import math
from collections import Counter
from collections.abc import Collection
from itertools import chain
from typing import Any

import torch
from torch import nn

from samfast.adapters.checks import check_alpha, check_rank
from samfast.adapters.method import Method
from samfast.methods.lora.method import Lora

PREFIX = "base_model.model."
_FACTORS = ("lora_A", "lora_B")
# PEFT copies a module to train it whole and calls the copy, so the module needs a forward.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# Options that change the meaning of lora_A and lora_B, with their neutral value.
_PLAIN_OPTIONS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "monteclora_config": None,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
# Other initialisations subtract the start from the base weights, which are not in the folder.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def to_key(name: str) -> str:
    """Return PEFT's key for the tensor that the model calls ``name``."""
    factor = name.rpartition(".")[2] in _FACTORS
    return f"{PREFIX}{name}.weight" if factor else PREFIX + name


def from_key(key: str) -> str:
    """Return the model's name for the tensor that PEFT calls ``key``."""
    name = key.removeprefix(PREFIX)
    layer, _, leaf = name.rpartition(".")
    return layer if leaf == "weight" and layer.rpartition(".")[2] in _FACTORS else name


def modules_to_save(model: nn.Module, trained: Collection[str]) -> list[str] | None:
    """Return names of modules whose tensors are exactly ``trained``; None if PEFT cannot list them.

    trained: full names of the parameters trained in addition to the adapters. A module that holds
        an adapter has other parameters too, so it is never in the list.
    """
    names = [name for name, _ in model.named_modules()]

    def cover(module: nn.Module, name: str) -> list[str] | None:
        inside = f"{name}." if name else ""
        own = [p for p, _ in module.named_parameters()]
        count = sum(inside + p in trained for p in own)
        if count == 0:
            return []
        callable_alone = name != "" and not isinstance(module, _CONTAINERS)
        alone = sum(other.endswith(name) for other in names) == 1  # PEFT compares endings
        if count == len(own) and callable_alone and alone:
            return [name]
        if any(inside + p in trained for p, _ in module.named_parameters(recurse=False)):
            return None
        parts = [cover(child, inside + leaf) for leaf, child in module.named_children()]
        whole = [part for part in parts if part is not None]
        return list(chain.from_iterable(whole)) if len(whole) == len(parts) else None

    return cover(model, "")


def _has_two_places(model: nn.Module, trained: Collection[str]) -> bool:
    """True if two modules share a trained Parameter: PEFT would copy it for one of them."""
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return any(places[id(p)] > 1 for name, p in model.named_parameters() if name in trained)


def lora_config(
    model: nn.Module, method: Method, layers: Collection[str], trained: Collection[str]
) -> dict[str, Any] | None:
    """Return PEFT's adapter_config.json for this adapter; None if PEFT cannot express it."""
    if type(method) is not Lora or method.slices is not None:
        return None
    names = [name for name, _ in model.named_modules()]
    if any(name.endswith(f".{layer}") for layer in layers for name in names):
        return None
    whole = modules_to_save(model, trained)
    if whole is None or _has_two_places(model, trained):
        return None
    return {
        "auto_mapping": {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        },
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": method.rank if method.alpha is None else method.alpha,
        "lora_dropout": method.dropout,
        "modules_to_save": whole or None,
        "peft_type": "LORA",
        "r": method.rank,
        "target_modules": sorted(layers),
        "task_type": None,
    }


def read_lora(
    config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[Lora, tuple[str, ...], dict[str, torch.Tensor]]:
    """Read method, adapted layers and tensors, by the model's names, from PEFT's folder.

    Raises ValueError with the reason if it is not plain LoRA.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"its peft_type is {kind!r}; samfast reads only PEFT's LORA")
    for option, plain in _PLAIN_OPTIONS.items():
        value = config.get(option, plain)
        if value != plain and (value or plain):
            raise ValueError(f"its option {option} is {value!r}, which samfast cannot read")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ValueError(f"its init_lora_weights is {start!r}, which changes the base weights")
    tensors = {from_key(key): value for key, value in tensors.items()}
    layers = sorted({n.rpartition(".")[0] for n in tensors if n.rpartition(".")[2] in _FACTORS})
    if not layers:
        raise ValueError("it holds no lora_A and lora_B")
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    check_rank(rank)
    check_alpha(alpha)
    method = Lora(
        rank=rank,
        alpha=(alpha or rank) * math.sqrt(rank) if config.get("use_rslora") else alpha,
        dropout=config.get("lora_dropout", 0.0),
        target=tuple(layers),
    )
    return method, tuple(layers), tensors
