# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.low_rank`` and ``samfast.adapters.checks``."""

from samfast.adapters.checks import (
    check_alpha,
    check_bottleneck,
    check_dropout,
    check_linear_rank,
    check_rank,
)
from samfast.adapters.low_rank import LowRankLinear

__all__ = [
    "LowRankLinear",
    "check_alpha",
    "check_bottleneck",
    "check_dropout",
    "check_linear_rank",
    "check_rank",
]
