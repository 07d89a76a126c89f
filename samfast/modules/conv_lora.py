# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for the modules below."""

from samfast.kernels.conv_experts.conv_lora import COEFFICIENT
from samfast.kernels.conv_experts.op import MAX_RATIO
from samfast.methods.conv_lora.checks import FORMULAS, check_choice, check_depthwise, check_experts
from samfast.methods.conv_lora.layer import ConvLoraLinear, checked_ratios

__all__ = [
    "COEFFICIENT",
    "FORMULAS",
    "MAX_RATIO",
    "ConvLoraLinear",
    "check_choice",
    "check_depthwise",
    "check_experts",
    "checked_ratios",
]
