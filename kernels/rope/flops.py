# SPDX-License-Identifier: Apache-2.0
"""FLOP of the operators for torch's FLOP counter, which does not look into them.

Importing registers the formulas: six FLOP for each pair that is rotated. torch does not count such
arithmetic, so a stock model's rotation counts nothing.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from samfast.kernels.rope import op  # noqa: F401 - defines the operators
from samfast.kernels.rope.costs import rotation

OPERATORS = ("samfast::rope_forward", "samfast::rope_backward")


@register_flop_formula(torch.ops.samfast.rope_forward, get_raw=True)
def _forward(qkv, cos, sin, windows, parts, *_, **__) -> int:
    return rotation(qkv[:, :, :, 0, 0, 0].numel(), parts * qkv.shape[4], qkv.shape[5])


@register_flop_formula(torch.ops.samfast.rope_backward, get_raw=True)
def _backward(dout, cos, sin, windows, parts, *_, **__) -> int:
    return _forward(dout, cos, sin, windows, parts)
