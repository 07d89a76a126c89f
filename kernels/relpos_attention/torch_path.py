# SPDX-License-Identifier: Apache-2.0
"""Attention block by block of queries from aten calls: any dtype, any device.

All paths of this operation have these two functions. Tensors of tokens are views with any strides.

q, k, v, dout (batch, H, W, heads, head_dim)   pad_k, pad_v (batch, pads, heads, head_dim)
table_h (2 · windows.height − 1, head_dim)   table_w (2 · windows.width − 1, head_dim)
Without tables (None) there is no bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from samfast.kernels._common.windows import Windows
from samfast.kernels.relpos_attention.reference import offsets_of

# Logits of one block. On a CPU a block should stay in the cache; on a GPU it should fill it.
BLOCK = {"cpu": 1 << 19}
BLOCK_ELSEWHERE = 1 << 26


def forward(
    q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None,
    table_h: Tensor | None, table_w: Tensor | None, windows: Windows, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (batch, H, W, heads, head_dim), dense, and lse (batch, heads, H · W), natural logarithm.

    pad_k and pad_v may be None where the padding holds zeros, and where there is none.
    """
    heads = q.shape[3]
    q, k, v = _cut(windows, q), _cut(windows, k, pad_k), _cut(windows, v, pad_v)
    factors = _factors(q, table_h, table_w)
    out, lse = torch.empty_like(q), q.new_empty((*q.shape[:3], 1), dtype=_wide(q))
    keys, values = k.flatten(1, 2), v.flatten(1, 2)
    for some, rows in _blocks(windows, q):
        at = some, rows
        logits = _logits(q[at], keys[some], [t[at] for t in factors], scale)
        lse[at] = logits.logsumexp(-1).view(lse[at].shape)
        out[at] = (logits.softmax(-1).to(q.dtype) @ values[some]).view(out[at].shape)
    lse = _paste(windows, lse, heads)[0][..., 0].flatten(1, 2).mT
    return _paste(windows, out, heads)[0], lse.contiguous()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None,
    table_h: Tensor | None, table_w: Tensor | None, out: Tensor, lse: Tensor, windows: Windows,
    scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor, dpad_k: Tensor | None, dpad_v: Tensor | None,
    need_tables: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Fills dq, dk, dv (as q) and, where given, dpad_k and dpad_v (batch, pads, heads, head_dim).

    Returns the gradients of the tables when need_tables, float32 (float64 for float64).
    """
    dout, q = _cut(windows, dout), _cut(windows, q)
    k, v = _cut(windows, k, pad_k), _cut(windows, v, pad_v)
    factors = _factors(q, table_h, table_w)
    dq_part, *dfactors = (torch.empty_like(t, dtype=_wide(q)) for t in (q, *factors))
    keys, values = k.flatten(1, 2), v.flatten(1, 2)
    dk_part, dv_part = (torch.zeros_like(t, dtype=_wide(q)) for t in (keys, values))
    for some, rows in _blocks(windows, q):
        at = some, rows
        query, grad = q[at].flatten(1, 2), dout[at].flatten(1, 2)
        logits = _logits(q[at], keys[some], [t[at] for t in factors], scale)
        weights = logits.softmax(-1)  # lse would do, and round a little more
        dv_part[some] += weights.to(q.dtype).mT @ grad
        dweights = (grad @ values[some].mT).to(_wide(q))
        dweights -= (weights * dweights).sum(-1, keepdim=True)
        weights *= dweights
        small = weights.to(q.dtype)  # weights is now the gradient of the logits
        dq_part[at] = ((small @ keys[some]) * scale).view(dq_part[at].shape)
        dk_part[some] += (small.mT @ query) * scale
        spread = weights.unflatten(2, (windows.height, windows.width))
        for dfactor, summed in zip(dfactors, (3, 2), strict=False):
            dfactor[at] = spread.sum(summed).view(dfactor[at].shape)
    if dfactors:
        drel_h, drel_w = dfactors
        dq_part += _spread(drel_h, table_h, q.dtype)
        dq_part += _spread(drel_w.transpose(1, 2), table_w, q.dtype).transpose(1, 2)
    size = (windows.height, windows.width)
    _put(windows, dq_part, dq, None)
    _put(windows, dk_part.unflatten(1, size), dk, dpad_k)
    _put(windows, dv_part.unflatten(1, size), dv, dpad_v)
    if not need_tables:
        return None
    turned = drel_w.transpose(1, 2), q.transpose(1, 2)
    return _table_grad(drel_h, q), _table_grad(*turned)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _cut(windows: Windows, t: Tensor, pad: Tensor | None = None) -> Tensor:
    """(batch, H, W, heads, C) -> (samples · heads, height, width, C)."""
    columns = t.shape[3] * t.shape[4]
    pad = None if pad is None else pad.reshape(windows.batch * windows.pads, columns)
    parts = windows.cut(t.reshape(windows.tokens, columns), pad)
    return parts.unflatten(3, t.shape[3:]).movedim(3, 1).flatten(0, 1)


def _paste(windows: Windows, t: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(samples · heads, height, width, C) -> (batch, H, W, heads, C), (batch, pads, heads, C)."""
    tokens, pads = windows.paste(t.unflatten(0, (windows.samples, heads)).movedim(1, 3).flatten(3))
    shape = (windows.batch, windows.image_height, windows.image_width, heads, t.shape[3])
    return tokens.view(shape), pads.view(windows.batch, windows.pads, heads, t.shape[3])


def _put(windows: Windows, t: Tensor, image: Tensor, pads: Tensor | None) -> None:
    tokens, beside = _paste(windows, t, image.shape[3])
    image.copy_(tokens)
    if pads is not None:
        pads.copy_(beside)


def _near(table: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return table[offsets_of(size, table.device)].to(dtype)  # (size, size, head_dim)


def _factors(q: Tensor, table_h: Tensor | None, table_w: Tensor | None) -> tuple[Tensor, ...]:
    """rel_h (G, height, width, height) and rel_w (G, height, width, width); none without tables."""
    if table_h is None:
        return ()
    rel_h = q @ _near(table_h, q.shape[1], q.dtype).mT
    rel_w = q.transpose(1, 2) @ _near(table_w, q.shape[2], q.dtype).mT
    return rel_h, rel_w.transpose(1, 2)


def _spread(drel: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient with respect to q of q @ near, axis 1 of which is the table's axis."""
    return (drel.to(dtype) @ _near(table, drel.shape[1], dtype)).to(drel.dtype)


def _table_grad(drel: Tensor, q: Tensor) -> Tensor:
    """The gradient with respect to the table: sums along diagonals, in fixed order."""
    size = drel.shape[1]
    grad = torch.einsum("ghwk,ghwc->hkc", drel, q.to(drel.dtype)).flip(1)  # at h + k of the sum
    skew = F.pad(grad, (0, 0, 0, size)).flatten(0, 1)[: size * (2 * size - 1)]
    return skew.unflatten(0, (size, -1)).sum(0)


def _blocks(windows: Windows, q: Tensor):
    """(samples · heads, query rows), slices whose logits make one block."""
    line = windows.width * windows.height * windows.width
    budget = BLOCK.get(q.device.type, BLOCK_ELSEWHERE)
    rows = min(max(budget // line, 1), windows.height)
    some = max(budget // (line * windows.height), 1)
    for first in range(0, q.shape[0], some):
        for row in range(0, windows.height, rows):
            yield slice(first, first + some), slice(row, row + rows)


def _logits(q, keys, factors, scale: float) -> Tensor:
    """q (G, rows, width, C), keys (G, keys, C) -> (G, queries, keys), in the wide dtype."""
    logits = (q.flatten(1, 2) @ keys.mT).to(_wide(q)) * scale
    if not factors:
        return logits
    rel_h, rel_w = factors
    as_map = logits.unflatten(2, (rel_h.shape[3], rel_w.shape[3]))
    as_map += rel_h.flatten(1, 2)[..., :, None]
    as_map += rel_w.flatten(1, 2)[..., None, :]
    return logits
