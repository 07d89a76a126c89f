# SPDX-License-Identifier: Apache-2.0
"""Read PEFT's LoraConfig for ``attach``: plain LoRA, or a sentence about what is not plain.

A config is known by its class, so PEFT is not imported.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from samfast.adapters.checks import check_rank
from samfast.adapters.foreign import Foreign
from samfast.integrations.peft_names import layers_of, patterns_of, trained_modules
from samfast.methods.lora.method import Lora

_BASE = ("peft.config", "PeftConfigMixin")
_READ = (
    "exclude_modules",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "target_modules",
    "task_type",
    "use_rslora",
)
_NOTES = (  # options without effect on a plain adapter
    "auto_mapping",
    "base_model_name_or_path",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)
_STARTS = (True, False, "gaussian")
_HEADS = {"SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}
_BY_PEFT = "call peft.get_peft_model(model, config), then samfast.fuse"
_INSTEAD = {
    "inference_mode": "set it to False to train, or load a folder with samfast.load_adapter",
    "layers_pattern": "name the layers in target_modules",
    "layers_to_transform": "name the layers in target_modules",
}


def is_config(value: Any) -> bool:
    """True for a config of PEFT, whatever its method."""
    return any((kind.__module__, kind.__qualname__) == _BASE for kind in type(value).__mro__)


def check_config(config: Any) -> None:
    """Raise TypeError for a config of another method, ValueError for more than plain LoRA."""
    kind = type(config).__name__
    if _text(config.peft_type) != "LORA":
        raise TypeError(
            f"expected one of samfast's methods or PEFT's LoraConfig, got PEFT's {kind}; "
            "call peft.get_peft_model(model, config)"
        )
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), _default(field)
        if field.name in (*_READ, *_NOTES) or _same(value, default):
            continue
        raise ValueError(
            f"{kind} has {field.name}={reprlib.repr(value)}, which samfast.attach cannot do; "
            f"{_INSTEAD.get(field.name, _BY_PEFT)}"
        )
    if getattr(config, "_custom_modules", None):
        raise ValueError(f"{kind} has custom modules, which samfast.attach cannot do; {_BY_PEFT}")
    if (head := _HEADS.get(_text(config.task_type) or "")) is not None:
        raise ValueError(
            f"{kind} has task_type={_text(config.task_type)!r}, for which PEFT trains a {head} "
            "too; leave it out, and name in modules_to_save what is trained"
        )
    if _start(config) not in _STARTS:
        raise ValueError(
            f"{kind} has init_lora_weights={config.init_lora_weights!r}, but samfast.attach takes "
            f'True, False and "gaussian"; {_BY_PEFT}'
        )


def translated(
    config: Any, model: nn.Module, prefix: str, train: tuple[str, ...] | str | None
) -> tuple[Lora, dict[str, nn.Module], tuple[str, ...] | str]:
    """Read method, layers and modules trained whole from a checked config.

    prefix: what a wrapper puts before the model's names   train: what the caller named, or None
    """
    if train is not None and config.modules_to_save:
        raise ValueError(
            f"train is {train!r} and modules_to_save is {config.modules_to_save!r}; both name what "
            "to train whole, so pass only one of them"
        )
    layers = layers_of(config, model, prefix)
    train = trained_modules(config, model) if train is None else train
    check_rank(config.r)
    alpha = config.lora_alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"lora_alpha is {alpha!r}; it must be a finite number above 0")
    method = Lora(
        rank=config.r,
        alpha=alpha * math.sqrt(config.r) if config.use_rslora else alpha,
        dropout=config.lora_dropout,
        target=patterns_of(config, model, layers),
    )
    return method, layers, train


def start(config: Any, adapted: Mapping[str, Foreign]) -> None:
    """Fill the factors as init_lora_weights says; they are already filled for True."""
    for layer in adapted.values():
        if _start(config) == "gaussian":
            nn.init.normal_(layer.lora_A, std=1 / layer.rank)
        elif _start(config) is False:
            nn.init.kaiming_uniform_(layer.lora_B, a=math.sqrt(5))


def _start(config: Any) -> Any:
    value = config.init_lora_weights
    return value.lower() if isinstance(value, str) else value


def _text(value: Any) -> str | None:
    """Return the text of an enum or a string."""
    return getattr(value, "value", value)


def _same(value: Any, default: Any) -> bool:
    """True if an option has its default, or is empty in any form."""
    if _nothing(value) or _nothing(default):
        return _nothing(value) and _nothing(default)
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def _nothing(value: Any) -> bool:
    return value is None or value is False or (hasattr(value, "__len__") and len(value) == 0)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
