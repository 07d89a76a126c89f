# SPDX-License-Identifier: Apache-2.0
"""``conv_experts`` in aten calls, for any device and dtype: banded matrices along each axis.

With L[a] the matrix of tap a (axis.py), P_o = Σ_{a,b,i} k[o,i,a,b] L[a] Z_i L[b]ᵀ holds all points
that expert output o is read at, and E_o = D act(P_o + c_o) Dᵀ. Rows are taken one phase at a time,
so the largest tensors are twelve times h, and the matrices 12 · (H² + W²) numbers a sample.
"""

import torch

from samfast.kernels.conv_experts.axis import PHASES, tables
from samfast.kernels.conv_experts.footprint import distances, finite, spoiled


def forward(h, weight, bias, index, windows, ratios, residual, activation):
    """z and z_pad."""
    whole = windows.cut(_wide(h))
    z, broken = finite(whole)
    experts = _Experts(z, weight, bias, index, ratios)
    out = whole if residual else torch.zeros_like(z)
    for phase in range(PHASES):
        points = experts.points(phase)
        out = out + experts.shrink(_act(points, activation), phase)
    out = spoiled(out, broken, experts.reach, experts.depthwise)
    out = torch.where(experts.valid[:, None, None, None], out, torch.nan)
    image, pad = windows.paste(out)
    return image.to(h.dtype), pad.to(h.dtype)


def backward(
    dz, dz_pad, h, weight, bias, index, windows, ratios, residual, activation, balance, needs
):
    """dh, dweight, dbias and, with ``balance``, the gradients of the gate's two matrices."""
    need_h, need_weight = needs
    whole = windows.cut(_wide(dz), None if dz_pad is None else _wide(dz_pad))
    (z, broken), (dout, dbroken) = finite(windows.cut(_wide(h))), finite(whole)
    experts = _Experts(z, weight, bias, index, ratios)
    dh = dweight = dbias = dw_gate = dw_noise = None
    dbias_n, dmixed = 0.0, 0.0
    for phase in range(PHASES):
        dpoints = experts.shrink_back(dout, phase) * _slope(experts.points(phase), activation)
        dbias_n = dbias_n + dpoints.sum((2, 3))
        dmixed = dmixed + experts.rows_back(dpoints, phase)
    if need_weight:
        of_expert = index == torch.arange(len(ratios), device=index.device)[:, None]
        dkernel = experts.kernel_gradient(dmixed)
        dbias_n, dkernel = _broken_sums(dbias_n, dkernel, broken, dbroken, experts, activation)
        dweight = _per_expert(dkernel, of_expert).to(weight.dtype)
        dbias = _per_expert(dbias_n, of_expert).to(bias.dtype)
    if need_h:
        dsamples = experts.source_gradient(dmixed)
        dsamples = spoiled(dsamples, dbroken, experts.reach, experts.depthwise)
        if activation != "none":  # whose slope is one wherever it is asked
            dsamples = spoiled(dsamples, broken, experts.twice, experts.depthwise)
        dsamples = dsamples + whole if residual else dsamples
        if balance is not None:
            dsamples = dsamples + (balance[0] * balance[1])[:, None, None, :]
        dh = windows.paste(dsamples)[0].to(h.dtype)
    if balance is not None:
        dw_gate, dw_noise = balance[0] * balance[2][0], balance[0] * balance[2][1]
    return dh, dweight, dbias, dw_gate, dw_noise


class _Experts:
    """The products of one call. z (N, H, W, r); points (N, r, H, 4·W), all column phases."""

    def __init__(self, z, weight, bias, index, ratios):
        n, height, width, rank = z.shape
        last = len(ratios) - 1
        self.valid = (index >= 0) & (index <= last)
        index = index.clamp(0, last)
        self.reach, self.twice = distances(tuple(ratios), index.device)[index].unbind(1)
        rows, self.row_weights = (
            t[index] for t in tables(height, tuple(ratios), z.device, z.dtype)
        )  # (N, 3, 4, H, H), (N, 4)
        columns, weights = (t[index] for t in tables(width, tuple(ratios), z.device, z.dtype))
        self.column_weights = weights
        self.rows = rows
        # (N, 3, 4, W, W) -> (N, 3·4·W, W): every tap and phase of a row in one product
        self.columns = columns.reshape(n, 3 * PHASES * width, width)
        self.depthwise = weight.shape[2] == 1 and rank > 1
        self.kernel = weight.to(z.dtype)[index]  # (N, o, i, 3, 3)
        self.bias = bias.to(z.dtype)[index]
        self.shape = (n, height, width, rank)
        lines = z.permute(0, 3, 1, 2).reshape(n, rank * height, width)
        spread = torch.bmm(lines, self.columns.mT).view(n, rank, height, 3, PHASES * width)
        self.spread = spread.permute(0, 3, 1, 2, 4)  # (N, b, i, H, 4·W)
        taps = "noab,nboyx->naoyx" if self.depthwise else "noiab,nbiyx->naoyx"
        self.mixed = torch.einsum(taps, self._taps(), self.spread)  # (N, a, o, H, 4·W)

    def _taps(self):
        return self.kernel[:, :, 0] if self.depthwise else self.kernel

    def points(self, phase):
        """What the activation sees at one phase of the rows."""
        p = torch.einsum("nahy,naoyx->nohx", self.rows[:, :, phase], self.mixed)
        return p + self.bias[:, :, None, None]

    def shrink(self, values, phase):
        """This phase's share of E (N, H, W, r)."""
        n, height, width, rank = self.shape
        values = values.view(n, rank, height, PHASES, width)
        out = torch.einsum("nohpw,np->nhwo", values, self.column_weights)
        return out * self.row_weights[:, phase, None, None, None]

    def shrink_back(self, dout, phase):
        n, height, width, rank = self.shape
        dout = dout * self.row_weights[:, phase, None, None, None]
        return torch.einsum("nhwo,np->nohpw", dout, self.column_weights).reshape(
            n, rank, height, PHASES * width
        )

    def rows_back(self, dpoints, phase):
        return torch.einsum("nahy,nohx->naoyx", self.rows[:, :, phase], dpoints)

    def kernel_gradient(self, dmixed):
        if self.depthwise:
            return torch.einsum("naoyx,nboyx->noab", dmixed, self.spread)[:, :, None]
        return torch.einsum("naoyx,nbiyx->noiab", dmixed, self.spread)

    def source_gradient(self, dmixed):
        n, height, width, rank = self.shape
        taps = "noab,naoyx->noybx" if self.depthwise else "noiab,naoyx->niybx"
        dspread = torch.einsum(taps, self._taps(), dmixed)
        lines = dspread.reshape(n, rank * height, 3 * PHASES * width)
        return torch.bmm(lines, self.columns).view(n, rank, height, width).permute(0, 2, 3, 1)


def _wide(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _act(p, activation):
    return torch.nn.functional.gelu(p) if activation == "gelu" else p


def _slope(p, activation):
    """The activation's derivative; for GELU Φ(p) + p φ(p)."""
    if activation == "none":
        return torch.ones_like(p)
    return torch.special.ndtr(p) + p * torch.exp(-0.5 * p * p) * (2 * torch.pi) ** -0.5


def _broken_sums(dbias, dkernel, broken, dbroken, experts, activation):
    """Sums over the pixels of a sample, (N, o) and (N, o, i, 3, 3), NaN where one was left out."""
    if dbroken is not None:
        outputs = dbroken.flatten(1, 2).any(1)  # (N, o)
        dbias = dbias.masked_fill(outputs, torch.nan)
        dkernel = dkernel.masked_fill(outputs[:, :, None, None, None], torch.nan)
    if broken is not None:
        sources = broken.flatten(1, 2).any(1)  # (N, i)
        outputs = sources if experts.depthwise else sources.any(1, keepdim=True)
        own = sources[:, :, None] if experts.depthwise else sources[:, None, :]
        if activation != "none":
            dbias = dbias.masked_fill(outputs, torch.nan)
            own = own | outputs[:, :, None]
        dkernel = dkernel.masked_fill(own[..., None, None], torch.nan)
    return dbias, dkernel


def _per_expert(values, of_expert):
    """Sums over the samples of each expert, (N, …) -> (M, …); a mask, so that NaN stays put."""
    mask = of_expert.view(*of_expert.shape, *([1] * (values.dim() - 1)))
    return torch.where(mask, values, 0.0).sum(1)
