# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.fused.rel_pos_attention``."""

from torch import nn

from samfast.fused.rel_pos_attention import RelPosAttention
from samfast.methods.cobot.layer import CobotQkvLora
from samfast.methods.kronecker.layer import KroneckerLinear
from samfast.methods.lora.layer import LoraLinear
from samfast.methods.lora.qkv_layer import QkvLora
from samfast.methods.ta_lora.layer import TaskLoraLinear

TOKEN_WISE = (nn.Linear, LoraLinear, QkvLora, CobotQkvLora, KroneckerLinear, TaskLoraLinear)

__all__ = [
    "TOKEN_WISE",
    "CobotQkvLora",
    "KroneckerLinear",
    "LoraLinear",
    "QkvLora",
    "RelPosAttention",
    "TaskLoraLinear",
]
