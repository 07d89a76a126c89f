# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.methods.lora.layer``."""

from samfast.methods.lora.layer import LoraLinear

__all__ = ["LoraLinear"]
