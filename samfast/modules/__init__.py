# SPDX-License-Identifier: Apache-2.0
"""Adapted and fused layers under one name. The files here keep the import paths of 0.1.0.

Pickled models name them too. Each file re-exports what moved elsewhere.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samfast.methods.cobot.layer import CobotQkvLora
from samfast.methods.conv_lora.layer import ConvLoraLinear
from samfast.methods.kronecker.layer import KroneckerLinear
from samfast.methods.kronecker.phm_layer import PHMLinear, QuaternionLinear
from samfast.methods.lora.layer import LoraLinear
from samfast.methods.lora.qkv_layer import QkvLora
from samfast.methods.ta_lora.layer import TaskLoraLinear

if TYPE_CHECKING:
    from samfast.fused.rel_pos_attention import RelPosAttention
    from samfast.fused.sam_block import SamBlock
    from samfast.methods.adapt_former.cobot_layer import CobotAdaptFormerMlp
    from samfast.methods.adapt_former.layer import AdaptFormerMlp

# They inherit segment_anything's classes, which are loaded on first access.
_INHERITING = {
    "AdaptFormerMlp": "samfast.methods.adapt_former.layer",
    "CobotAdaptFormerMlp": "samfast.methods.adapt_former.cobot_layer",
    "RelPosAttention": "samfast.fused.rel_pos_attention",
    "SamBlock": "samfast.fused.sam_block",
}
__all__ = [
    "AdaptFormerMlp",
    "CobotAdaptFormerMlp",
    "CobotQkvLora",
    "ConvLoraLinear",
    "KroneckerLinear",
    "LoraLinear",
    "PHMLinear",
    "QkvLora",
    "QuaternionLinear",
    "RelPosAttention",
    "SamBlock",
    "TaskLoraLinear",
]


def __getattr__(name: str) -> Any:
    if name in _INHERITING:
        value = getattr(importlib.import_module(_INHERITING[name]), name)
        globals()[name] = value
        return value
    if (Path(__file__).parent / f"{name}.py").is_file():
        return importlib.import_module(f"samfast.modules.{name}")
    raise AttributeError(f"module 'samfast.modules' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
