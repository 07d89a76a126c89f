# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.published``."""

from samfast.adapters.published import PublishedNames

__all__ = ["PublishedNames"]
