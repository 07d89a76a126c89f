# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.fused.fuse``."""

from samfast.fused.fuse import attention_states, block_states, fuse, fused_blocks, unfuse

__all__ = ["attention_states", "block_states", "fuse", "fused_blocks", "unfuse"]
