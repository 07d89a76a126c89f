# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.files.adapter_files`` and ``samfast.files.format``."""

from samfast.files.adapter_files import load_adapter, save_adapter
from samfast.files.format import (
    CONFIG,
    TENSORS,
    VERSION,
    AdapterFile,
    read_adapter,
    read_adapter_config,
)
from samfast.models.heads import HEADS, MULTI_TASK

__all__ = [
    "CONFIG",
    "HEADS",
    "MULTI_TASK",
    "TENSORS",
    "VERSION",
    "AdapterFile",
    "load_adapter",
    "read_adapter",
    "read_adapter_config",
    "save_adapter",
]
