# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.wrappers``."""

from samfast.adapters.wrappers import (
    ATTACHMENT,
    ENCODER,
    levels,
    prefix_of,
    refuse_new_parameters,
    unclear,
    unwrapped,
)

__all__ = [
    "ATTACHMENT",
    "ENCODER",
    "levels",
    "prefix_of",
    "refuse_new_parameters",
    "unclear",
    "unwrapped",
]
