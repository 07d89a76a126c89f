# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for the modules below."""

from samfast.adapters.checks import QKV
from samfast.adapters.method import Method
from samfast.methods.adapt_former.method import AdaptFormer
from samfast.methods.cobot.method import CobotLora
from samfast.methods.conv_lora.method import ConvLora
from samfast.methods.kronecker.method import Kronecker
from samfast.methods.lora.method import Lora
from samfast.methods.registry import METHODS, DecoderOnly, method_from_config
from samfast.methods.ta_lora.method import TaLora

__all__ = [
    "METHODS",
    "QKV",
    "AdaptFormer",
    "CobotLora",
    "ConvLora",
    "DecoderOnly",
    "Kronecker",
    "Lora",
    "Method",
    "TaLora",
    "method_from_config",
]
