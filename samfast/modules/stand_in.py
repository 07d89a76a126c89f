# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.stand_in``."""

from samfast.adapters.stand_in import altered, kind_of, standing_in

__all__ = ["altered", "kind_of", "standing_in"]
