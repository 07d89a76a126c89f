# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.fused.report``."""

from samfast.fused.report import Report, report

__all__ = ["Report", "report"]
