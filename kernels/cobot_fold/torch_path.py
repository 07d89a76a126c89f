# SPDX-License-Identifier: Apache-2.0
"""The fold and its gradient in aten calls over all slices at once, for any device and dtype.

The fold runs in float32 (float64 for float64). Its gradients run in float64, because they add up
all rows of a factor to a few numbers. Layers come stacked: gammas (N, n·V), heads (N, n, 4, q, q)
with q = V/4, factors (N, n·R, V), or (N, V, R) with ``down``, biases (N, V) or empty.
"""

import torch
from torch import Tensor

# By quarters: row a of W has at column b the quarter WHICH[a][b], negated where SIGN[a][b] is -1.
WHICH = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))
SIGN = ((1, 1, 1, 1), (-1, 1, 1, -1), (-1, -1, 1, 1), (-1, 1, -1, 1))


def forward(
    c: Tensor, p: Tensor, gammas: list[Tensor], heads: list[Tensor], factors: list[Tensor],
    biases: list[Tensor], first: int, down: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Factors and biases, folded and stacked, in their dtypes."""
    wide = torch.promote_types(factors[0].dtype, torch.float32)
    lam, w, f, b = _parts(c, p, gammas, heads, factors, biases, first, down, wide)
    k = lam[:, :, None] * w
    folded = torch.matmul(k.mT, f) if down else torch.matmul(f, k.mT)
    folded = folded.reshape(len(factors), *factors[0].shape).to(factors[0].dtype)
    if not down:
        return folded, folded.new_empty(0)
    return folded, torch.matmul(b[:, None], k)[:, 0].to(biases[0].dtype)


def backward(
    dfolded: Tensor, dshifts: Tensor | None, c: Tensor, p: Tensor, gammas: list[Tensor],
    heads: list[Tensor], factors: list[Tensor], biases: list[Tensor], first: int, down: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of c, p, and, stacked, of gammas, heads, factors and biases."""
    lam, w, f, b = _parts(c, p, gammas, heads, factors, biases, first, down, torch.float64)
    slices, v = lam.shape
    d = dfolded.to(f.dtype).reshape(f.shape)
    k = lam[:, :, None] * w
    if down:
        df, dk = torch.matmul(k, d), torch.matmul(f, d.mT)
        ds = dshifts.to(f.dtype)
        dk += b[:, :, None] * ds[:, None]
        db = torch.matmul(ds[:, None], k.mT)[:, 0].to(biases[0].dtype)
    else:
        df, dk = torch.matmul(d, k), torch.matmul(d.mT, f)
        db = factors[0].new_empty(0)
    dlam = (dk * w).sum(2)
    quarters = (lam[:, :, None] * dk).view(slices, 4, v // 4, 4, v // 4)
    dheads = f.new_zeros(slices, 4, v // 4, v // 4)
    for row in range(4):
        for column in range(4):
            dheads[:, WHICH[row][column]] += SIGN[row][column] * quarters[:, row, :, column]
    wide_c, wide_p = c[0].to(f.dtype), p.to(f.dtype)
    dp = wide_p.new_zeros(p.shape)
    dp[:, first : first + slices] = wide_c.t() @ dlam.t()
    dc = dlam.t() @ wide_p[:, first : first + slices].t()
    layers = len(gammas)
    return [
        dc[None].to(c.dtype),
        dp.to(p.dtype),
        dlam.reshape(layers, -1).to(gammas[0].dtype),
        dheads.reshape(layers, *heads[0].shape).to(heads[0].dtype),
        df.reshape(layers, *factors[0].shape).to(factors[0].dtype),
        db,
    ]


def _parts(c, p, gammas, heads, factors, biases, first, down, wide):
    """λ (S, V), W (S, V, V), the factors (S, R, V) or (S, V, R), and the biases (S, V)."""
    v = c.shape[1]
    gamma = torch.cat(gammas).to(wide).view(-1, v)
    slices = len(gamma)
    coefficients = torch.matmul(c[0].to(wide), p.to(wide))  # of all slices: always the same bits
    lam = gamma + coefficients[:, first : first + slices].t()
    quarters = torch.cat(heads).to(wide).unbind(1)
    rows = [
        torch.cat([s * quarters[q] for s, q in zip(SIGN[a], WHICH[a], strict=True)], 2)
        for a in range(4)
    ]
    f = torch.cat(factors).to(wide)
    f = f.view(slices, v, -1) if down else f.view(slices, -1, v)
    b = torch.cat(biases).to(wide).view(-1, v) if down else None
    return lam, torch.cat(rows, 1), f, b
