# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.methods.kronecker.phm_layer``."""

from samfast.methods.kronecker.phm_layer import PHMLinear, QuaternionLinear, hamilton_rules

__all__ = ["PHMLinear", "QuaternionLinear", "hamilton_rules"]
