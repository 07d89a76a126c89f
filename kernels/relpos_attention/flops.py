# SPDX-License-Identifier: Apache-2.0
"""FLOP of the operators for torch's FLOP counter, which does not look into them.

Importing registers the formulas: two products over all pairs of query and key forwards, five
backwards, and those with the tables. Queries are the image's tokens, keys include the padding.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention import op  # noqa: F401 - defines the operators
from samfast.kernels.relpos_attention.costs import cpu_stages

_OPS = torch.ops.samfast
OPERATORS = tuple(
    f"samfast::{kind}_{way}"
    for kind in ("relpos_attention", "window_relpos_attention")
    for way in ("forward", "backward")
)


def _stages(q, windows, tables: bool):
    """q: (..., heads, head_dim)"""
    return cpu_stages(Windows(*windows), *q.shape[-2:], q.element_size(), tables)


@register_flop_formula(_OPS.relpos_attention_forward, get_raw=True)
def _apart_forward(q, k, v, table_h, table_w, windows, *_, **__) -> int:
    return _stages(q, windows, True)[0].flops


@register_flop_formula(_OPS.relpos_attention_backward, get_raw=True)
def _apart_backward(dout, out, lse, q, k, v, table_h, table_w, windows, *rest, **_) -> int:
    return _stages(q, windows, any(rest[-1][3:]))[1].flops


@register_flop_formula(_OPS.window_relpos_attention_forward, get_raw=True)
def _packed_forward(qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, *_, **__) -> int:
    return _stages(qkv, windows, True)[0].flops


@register_flop_formula(_OPS.window_relpos_attention_backward, get_raw=True)
def _packed_backward(
    dout, out, lse, qkv, pad_bias, pad_h, pad_b, table_h, table_w, windows, *rest, **_
) -> int:
    return _stages(qkv, windows, any(rest[-1][4:]))[1].flops
