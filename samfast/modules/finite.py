# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.finite``."""

from samfast.adapters.finite import base_problem, not_finite

__all__ = ["base_problem", "not_finite"]
