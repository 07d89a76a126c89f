# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the padding of windows, from their sources, and the sources' gradients."""

import torch


def _dense(t, dtype):
    """A dense copy: libraries round a product differently if a factor has another memory layout."""
    return t.to(dtype).contiguous()


def padding(pad_bias, pad_h, pad_b, windows, qkv):
    """The padding's k and v, (batch, pads, heads, head_dim); None where there is none to see.

    The rows of pad_h differ, so they are multiplied out. Only a bias is one row, seen everywhere.
    """
    heads, head_dim = qkv.shape[4:]
    if windows.pads == 0 or (pad_bias is None and pad_h is None):
        return None, None
    width = heads * head_dim
    kv = None if pad_bias is None else pad_bias[width:].to(qkv.dtype)
    if pad_h is not None:
        factor = _dense(pad_b[width:], qkv.dtype).T
        rows = _dense(pad_h, qkv.dtype)
        kv = rows @ factor if kv is None else torch.addmm(kv, rows, factor)
        kv = kv.view(windows.batch, windows.pads, 2, heads, head_dim)
    else:
        kv = kv.view(2, heads, head_dim).expand(windows.batch, windows.pads, -1, -1, -1)
    return kv[:, :, 0], kv[:, :, 1]


def padding_grads(dpads, pad_bias, pad_h, pad_b, needs):
    """Gradients of pad_bias, pad_h and pad_b, None where not needed; the queries' third is 0."""
    sources = zip((pad_bias, pad_h, pad_b), needs, strict=True)
    if dpads is None:
        return [t.new_zeros(t.shape) if need else None for t, need in sources]
    rows = dpads.flatten(0, 1).flatten(1)  # (batch · pads, 3 · D)
    width = rows.shape[1] // 3
    rows = rows[:, width:]
    dbias = dh = db = None
    if needs[0]:
        total = rows.sum(0, dtype=torch.promote_types(rows.dtype, pad_bias.dtype))
        dbias = torch.cat([total.new_zeros(width), total]).to(pad_bias.dtype)
    if needs[1]:
        dh = (rows @ _dense(pad_b[width:], rows.dtype)).to(pad_h.dtype)
    if needs[2]:
        update = (rows.T @ _dense(pad_h, rows.dtype)).to(pad_b.dtype)
        db = torch.cat([update.new_zeros(width, update.shape[1]), update])
    return [dbias, dh, db]
