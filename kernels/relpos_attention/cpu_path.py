# SPDX-License-Identifier: Apache-2.0
"""Attention in C++ (csrc/cpu/relpos_attention.cpp); the two functions are those of torch_path."""

import torch

_native = torch.ops.samfast_native


def forward(q, k, v, pad_k, pad_v, table_h, table_w, windows, scale):
    """out (batch, H, W, heads, head_dim), dense, and lse (batch, heads, H · W), natural logarithm.

    pad_k and pad_v may be None where the padding holds zeros, and where there is none. The tables
    are None where there is no bias.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[0], q.shape[3], q.shape[1] * q.shape[2], dtype=torch.float32)
    if table_h is None:
        _native.window_attention_forward(q, k, v, pad_k, pad_v, windows, scale, out, lse)
        return out, lse
    _native.relpos_attention_forward(
        q, k, v, pad_k, pad_v, _dense(table_h), _dense(table_w), windows, scale, out, lse
    )
    return out, lse


def backward(
    dout, q, k, v, pad_k, pad_v, table_h, table_w, out, lse, windows, scale, dq, dk, dv, dpad_k,
    dpad_v, need_tables,
):  # fmt: skip
    """Fills dq, dk, dv (as q) and, where given, dpad_k and dpad_v (batch, pads, heads, head_dim).

    Returns the gradients of the tables when need_tables, float32.
    """
    if table_h is None:
        _native.window_attention_backward(
            dout.to(q.dtype), q, k, v, pad_k, pad_v, out, lse.contiguous(), windows, scale, dq, dk,
            dv, dpad_k, dpad_v,
        )  # fmt: skip
        return None
    tables = _dense(table_h), _dense(table_w)
    grads = [torch.empty_like(t) for t in tables] if need_tables else [None, None]
    _native.relpos_attention_backward(
        dout.to(q.dtype), q, k, v, pad_k, pad_v, *tables, out, lse.contiguous(), windows, scale,
        dq, dk, dv, dpad_k, dpad_v, *grads,
    )  # fmt: skip
    return tuple(grads) if need_tables else None


def _dense(table):
    return table.float().contiguous()
