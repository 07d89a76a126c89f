# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for the modules below."""

from samfast.methods.kronecker.checks import check_divides, check_n
from samfast.methods.kronecker.layer import KroneckerLinear, reset_rules

__all__ = ["KroneckerLinear", "check_divides", "check_n", "reset_rules"]
