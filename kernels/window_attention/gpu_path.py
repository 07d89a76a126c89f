# SPDX-License-Identifier: Apache-2.0
"""Attention on a GPU: windows by relpos_attention's kernels without a bias, whole maps in 16 bits
by torch's flash attention, which has nothing to add there."""

from samfast.kernels.relpos_attention import triton_kernels
from samfast.kernels.window_attention import flash


def forward(q, k, v, pad_k, pad_v, windows, scale):
    """out and lse, as in torch_path."""
    if flash.takes(q, windows):
        return flash.forward(q, k, v, scale)
    return triton_kernels.forward(q, k, v, pad_k, pad_v, None, None, windows, scale)


def backward(dout, q, k, v, pad_k, pad_v, out, lse, windows, scale, dq, dk, dv, dpad_k, dpad_v):
    """Fills what torch_path fills."""
    if flash.takes(q, windows):
        flash.backward(dout, q, k, v, out, lse, scale, dq, dk, dv)
        return
    triton_kernels.backward(
        dout, q, k, v, pad_k, pad_v, None, None, out, lse, windows, scale, dq, dk, dv, dpad_k,
        dpad_v, False,
    )  # fmt: skip
