# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not contiguous."""


def odd_layouts(t):
    """The same values as a slice with NaN around it, permuted, and at an odd offset."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    wide[..., ::2] = t
    yield wide[..., ::2]
    order = list(range(t.dim()))[::-1]
    yield t.permute(order).contiguous().permute(order)
    buffer = t.new_full((t.numel() + 1,), float("nan"))
    buffer[1:] = t.flatten()
    yield buffer[1:].view(t.shape)
