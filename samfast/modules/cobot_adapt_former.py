# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.methods.adapt_former.cobot_layer``."""

from samfast.methods.adapt_former.cobot_layer import CobotAdaptFormerMlp

__all__ = ["CobotAdaptFormerMlp"]
