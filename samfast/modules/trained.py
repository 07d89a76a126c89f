# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.trained``."""

from samfast.adapters.trained import trained_state, trained_tensors

__all__ = ["trained_state", "trained_tensors"]
