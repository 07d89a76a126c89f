# SPDX-License-Identifier: Apache-2.0
"""The four rank-r stages of the engine in aten calls, for any device and dtype.

x (tokens, D), lora_a (R, D), h = drop(x) Aᵀ (tokens, R), z (tokens, Z), lora_b (n·L, r),
y and dy (tokens, O). ``slices`` describes which columns of y the rows of lora_b update.
Gradients of weights may wait in ``sums`` (engine.Sums); on this path they never do.
"""

import torch

from samfast.kernels._common.philox import keep_mask


def down(x, lora_a, dropout, seed):
    """h = drop(x) Aᵀ."""
    return torch.mm(_dropped(x, dropout, seed), lora_a.to(x.dtype).t())


def up_(y, z, lora_b, scaling, slices):
    """y += s · z Bᵀ in place, slice by slice."""
    for columns, b_rows, ranks in slices:
        b = lora_b[b_rows].to(y.dtype)
        y[:, columns].addmm_(z[:, ranks], b.t(), alpha=scaling)


def up_backward(dy, z, lora_b, scaling, slices, sums=None):
    """dz = s · dy B and, where z is given, dB = s · dyᵀ z."""
    dz = dy.new_zeros(dy.shape[0], slices.width)
    db = None if z is None else lora_b.new_empty(lora_b.shape)
    for columns, b_rows, ranks in slices:
        part = dy[:, columns]
        dz[:, ranks].addmm_(part, lora_b[b_rows].to(dy.dtype), alpha=scaling)
        if db is not None:
            db[b_rows] = scaling * torch.mm(part.t(), z[:, ranks])
    return dz, db


def down_backward_(dx, dh, x, lora_a, dropout, seed, sums=None):
    """dx += drop'(dh A) in place where dx is given; returns dA = dhᵀ drop(x) where x is."""
    if dx is not None:
        if dropout > 0.0:
            update = torch.mm(dh, lora_a.to(dh.dtype))
            dx.add_(_dropped(update, dropout, seed))
        else:
            dx.addmm_(dh, lora_a.to(dh.dtype))
    if x is None:
        return None
    return torch.mm(dh.t(), _dropped(x, dropout, seed)).to(lora_a.dtype)


def _dropped(x, dropout, seed):
    """drop(x); the mask is drawn in int64, which briefly takes many times x's memory."""
    if dropout == 0.0:
        return x
    return x * keep_mask(seed, *x.shape, dropout) / (1.0 - dropout)
