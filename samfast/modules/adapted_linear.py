# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.adapted_linear``."""

from samfast.adapters.adapted_linear import AdaptedLinear

__all__ = ["AdaptedLinear"]
