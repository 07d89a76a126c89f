# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for the modules below."""

from samfast.methods.cobot.checks import check_width
from samfast.methods.cobot.layer import (
    QUARTERS,
    CobotForward,
    CobotLayer,
    CobotQkvLora,
    fold,
    relation,
)

__all__ = [
    "QUARTERS",
    "CobotForward",
    "CobotLayer",
    "CobotQkvLora",
    "check_width",
    "fold",
    "relation",
]
