# SPDX-License-Identifier: Apache-2.0
"""The routed experts in C++ (csrc/cpu/conv_experts.cpp); the interface is that of torch_path."""

import torch

_native = torch.ops.samfast_native


def forward(h, weight, bias, index, windows, ratios, residual, activation):
    """h (tokens, r) -> z (tokens, r) and z_pad (batch · pads, r), of h's dtype."""
    h = h.contiguous()
    z, z_pad = torch.empty_like(h), h.new_empty(windows.batch * windows.pads, h.shape[1])
    _native.conv_experts_forward(
        h, _dense(weight), _dense(bias), index.contiguous(), windows, ratios, residual,
        activation == "gelu", z, z_pad,
    )  # fmt: skip
    return z, z_pad


def backward(
    dz, dz_pad, h, weight, bias, index, windows, ratios, residual, activation, balance, needs
):
    """dh, dweight, dbias, dw_gate and dw_noise; None for what is not needed or has no source.

    dz (tokens, r)   dz_pad (batch · pads, r) or None for zeros
    balance: None or (daux (), dpool (samples, r), dgate (2, r, M)), all float32
    needs: whether dh, and whether dweight and dbias, are wanted
    """
    need_h, need_weight = needs
    dh = h.new_empty(h.shape) if need_h else None
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if need_weight else None
    dbias = bias.new_empty(bias.shape, dtype=torch.float32) if need_weight else None
    daux, dpool, dgate = (None,) * 3 if balance is None else map(_dense, balance)
    gates = (None, None) if balance is None else (torch.empty_like(dgate[0]) for _ in range(2))
    dw_gate, dw_noise = gates
    _native.conv_experts_backward(
        dz.to(h.dtype).contiguous(), None if dz_pad is None else dz_pad.to(h.dtype).contiguous(),
        h.contiguous(), _dense(weight), _dense(bias), index.contiguous(), windows, ratios,
        residual, activation == "gelu", daux, dpool, dgate, dh, dweight, dbias, dw_gate, dw_noise,
    )  # fmt: skip
    if need_weight:
        dweight, dbias = dweight.to(weight.dtype), dbias.to(bias.dtype)
    return dh, dweight, dbias, dw_gate, dw_noise


def _dense(t):
    return t.float().contiguous()
