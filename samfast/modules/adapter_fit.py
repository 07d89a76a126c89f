# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.files.checking``."""

from samfast.files.checking import (
    check_base_of,
    check_same,
    check_tensors,
    find_layers_of,
    head_for,
    image_size_of,
    level_of,
)
from samfast.models.heads import HEADS

__all__ = [
    "HEADS",
    "check_base_of",
    "check_same",
    "check_tensors",
    "find_layers_of",
    "head_for",
    "image_size_of",
    "level_of",
]
