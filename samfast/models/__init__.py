# SPDX-License-Identifier: Apache-2.0
"""SAM itself: building it, loading its weights, and a differentiable, batched forward.

build_sam       segment_anything's Sam from a checkpoint or with random weights
segment         images (and prompts) to logits; encode and decode are its two halves
image_size      the side of the square that a model sees
unused_by_segment   the parameters that segment never reads
"""

from samfast.models.build import build_sam, image_size
from samfast.models.segment import decode, encode, segment, unused_by_segment

__all__ = ["build_sam", "decode", "encode", "image_size", "segment", "unused_by_segment"]
