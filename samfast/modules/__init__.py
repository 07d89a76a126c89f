# SPDX-License-Identifier: Apache-2.0
"""Adapted and fused layers, what places them, and the files that keep what was learned."""

import importlib

from samfast.modules.cobot import CobotQkvLora
from samfast.modules.conv_lora import ConvLoraLinear
from samfast.modules.hypercomplex import PHMLinear, QuaternionLinear
from samfast.modules.kronecker import KroneckerLinear
from samfast.modules.lora import LoraLinear
from samfast.modules.qkv_lora import QkvLora
from samfast.modules.task_lora import TaskLoraLinear

# They inherit segment_anything's classes, which are loaded when one of them is first asked for.
_INHERITING = {
    "AdaptFormerMlp": "samfast.modules.adapt_former",
    "CobotAdaptFormerMlp": "samfast.modules.cobot_adapt_former",
    "RelPosAttention": "samfast.modules.rel_pos_attention",
    "SamBlock": "samfast.modules.sam_block",
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


def __getattr__(name):
    if name in _INHERITING:
        value = getattr(importlib.import_module(_INHERITING[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'samfast.modules' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
