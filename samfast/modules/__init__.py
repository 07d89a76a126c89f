# SPDX-License-Identifier: Apache-2.0
"""Adapted layers, the methods that place them, and the files that keep what they learned."""

from samfast.modules.conv_lora import ConvLoraLinear
from samfast.modules.lora import LoraLinear
from samfast.modules.qkv_lora import QkvLora

__all__ = ["ConvLoraLinear", "LoraLinear", "QkvLora"]
