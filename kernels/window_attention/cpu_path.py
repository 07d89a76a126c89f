# SPDX-License-Identifier: Apache-2.0
"""Attention in C++ (csrc/cpu/relpos_attention.cpp) without a bias."""

from samfast.kernels.relpos_attention import cpu_path


def forward(q, k, v, pad_k, pad_v, windows, scale):
    """out and lse, as in torch_path."""
    return cpu_path.forward(q, k, v, pad_k, pad_v, None, None, windows, scale)


def backward(dout, q, k, v, pad_k, pad_v, out, lse, windows, scale, dq, dk, dv, dpad_k, dpad_v):
    """Fills what torch_path fills."""
    cpu_path.backward(
        dout, q, k, v, pad_k, pad_v, None, None, out, lse, windows, scale, dq, dk, dv, dpad_k,
        dpad_v, False,
    )  # fmt: skip
