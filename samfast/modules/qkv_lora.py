# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for the modules below."""

from samfast.adapters.checks import QKV, checked_slices
from samfast.methods.lora.qkv_layer import QkvLora

__all__ = ["QKV", "QkvLora", "checked_slices"]
