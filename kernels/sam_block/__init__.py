# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.sam_block.op import sam_block, supports

__all__ = ["sam_block", "supports"]
