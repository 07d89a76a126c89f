# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.methods.attach`` and ``samfast.adapters.wrappers``."""

from samfast.adapters.wrappers import ENCODER
from samfast.methods.attach import (
    BASE_DTYPES,
    attach,
    attach_to,
    check_attachable,
    check_layer,
    find_layers,
    find_trained,
    merge,
    merged_state_dict,
    parameter_groups,
    trainable_parameters,
    unmerge,
)

__all__ = [
    "BASE_DTYPES",
    "ENCODER",
    "attach",
    "attach_to",
    "check_attachable",
    "check_layer",
    "find_layers",
    "find_trained",
    "merge",
    "merged_state_dict",
    "parameter_groups",
    "trainable_parameters",
    "unmerge",
]
