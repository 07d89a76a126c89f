# SPDX-License-Identifier: Apache-2.0
"""Build SAM, load its weights, and run it as a differentiable, batched forward.

build_sam       segment_anything's Sam from a checkpoint or with random weights
segment         images (and prompts) to logits; encode and decode are its two halves
image_size, pixel_mean   the side of the square that a model sees, the value of its padding
unused_by_segment   the parameters that segment never reads
MultiTaskSam, Task  one encoder, and a decoder for each of several tasks
binary_head     one mask token and one hypernetwork; restore_head undoes it, head_of names the head
stock_state_dict    the state dict as a stock SAM loads it, whatever the head
TRAINED_DECODER     what ``attach`` trains of the mask decoder for a single mask
"""

from samfast.models.build import build_sam, image_size, pixel_mean
from samfast.models.heads import (
    TRAINED_DECODER,
    binary_head,
    head_of,
    restore_head,
    stock_state_dict,
)
from samfast.models.multi_task import MultiTaskSam, Task
from samfast.models.reading import unused_by_segment
from samfast.models.segment import decode, encode, segment

__all__ = [
    "TRAINED_DECODER",
    "MultiTaskSam",
    "Task",
    "binary_head",
    "build_sam",
    "decode",
    "encode",
    "head_of",
    "image_size",
    "pixel_mean",
    "restore_head",
    "segment",
    "stock_state_dict",
    "unused_by_segment",
]
