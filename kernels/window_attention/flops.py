# SPDX-License-Identifier: Apache-2.0
"""FLOP of the operators for torch's FLOP counter, which does not look into them.

Importing registers the formulas: two products over all pairs of query and key in the forward, five
in the backward. Queries are the image's tokens; keys include the padding.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from samfast.kernels._common.windows import Windows
from samfast.kernels.window_attention import op  # noqa: F401 - defines the operators
from samfast.kernels.window_attention.costs import cpu_stages

_OPS = torch.ops.samfast
OPERATORS = tuple(f"samfast::window_attention_{way}" for way in ("forward", "backward"))
_WINDOWS = 7  # its place among the inputs


def _stages(qkv, windows):
    return cpu_stages(Windows(*windows), *qkv.shape[-2:], qkv.element_size())


@register_flop_formula(_OPS.window_attention_forward, get_raw=True)
def _forward(qkv, *rest, **_) -> int:
    return _stages(qkv, rest[_WINDOWS - 1])[0].flops


@register_flop_formula(_OPS.window_attention_backward, get_raw=True)
def _backward(dout, out, lse, qkv, *rest, **_) -> int:
    return _stages(qkv, rest[_WINDOWS - 1])[1].flops
