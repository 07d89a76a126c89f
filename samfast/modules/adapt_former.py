# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.methods.adapt_former.layer``."""

from samfast.methods.adapt_former.layer import AdaptFormerMlp, BlockSide

__all__ = ["AdaptFormerMlp", "BlockSide"]
