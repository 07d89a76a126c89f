# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.files.peft_format``."""

from samfast.files.peft_format import (
    PREFIX,
    from_key,
    lora_config,
    modules_to_save,
    read_lora,
    to_key,
)

__all__ = ["PREFIX", "from_key", "lora_config", "modules_to_save", "read_lora", "to_key"]
