# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.fused.sam_block``."""

from samfast.fused.sam_block import SamBlock

__all__ = ["SamBlock"]
