# SPDX-License-Identifier: Apache-2.0
"""The four rank-r stages of the engine in C++ (csrc/cpu/lora_linear.cpp); see torch_path."""

import torch

from samfast.kernels._common.philox import threshold

_native = torch.ops.samfast_native


def down(x, lora_a, dropout, seed):
    h = x.new_empty(x.shape[0], lora_a.shape[0])
    _native.lora_down(_rows(x), _small(lora_a), h, dropout, seed, threshold(dropout))
    return h


def up_(y, z, lora_b, scaling, slices):
    for columns, b_rows, ranks in slices:
        _native.lora_up_(y[:, columns], z[:, ranks], _small(lora_b[b_rows]), scaling)


def up_backward(dy, z, lora_b, scaling, slices, sums=None):
    dy = _rows(dy)
    shared = slices.width == lora_b.shape[1]
    dz = None if shared else dy.new_empty(dy.shape[0], slices.width)
    db = None if z is None else lora_b.new_empty(lora_b.shape)
    for columns, b_rows, ranks in slices:
        b = _small(lora_b[b_rows])
        if z is None:
            part = dy.new_empty(dy.shape[0], b.shape[1])
            _native.lora_down(dy[:, columns], b.t().contiguous() * scaling, part, 0.0, None, 0)
        else:
            part, db_t = _native.lora_up_backward(dy[:, columns], z[:, ranks], b, scaling)
            db[b_rows] = db_t.t()
        if not shared:
            dz[:, ranks] = part
        else:
            dz = part if dz is None else dz.add_(part)
    return dz, db


def down_backward_(dx, dh, x, lora_a, dropout, seed, sums=None):
    x = None if x is None else _rows(x)
    a = _small(lora_a)
    da = _native.lora_down_backward_(dx, dh, x, a, dropout, seed, threshold(dropout))
    return None if x is None else da.to(lora_a.dtype)


def _rows(x):
    """A matrix whose rows are contiguous; what autograd saved stays as the caller laid it out."""
    if x.stride(1) == 1 or x.shape[1] <= 1:
        return x
    return x.contiguous() if x.numel() else x.new_empty(x.shape)  # contiguous() keeps empty strides


def _small(factor):
    return factor.float().contiguous()
