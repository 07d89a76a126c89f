# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.fused.proof``."""

from samfast.fused.proof import LAYERS, PARTS, READ, TABLES, objection, signature
