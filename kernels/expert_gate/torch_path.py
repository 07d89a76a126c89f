# SPDX-License-Identifier: Apache-2.0
"""The gate in aten calls, for any device: choice, balancing loss and the loss's gradient at once.

The loss is a function of few numbers. Its gradient is made with it and saved in place of everything
that a later backward would need.
"""

import torch
import torch.nn.functional as F


def forward(h, w_gate, w_noise, noise, index, windows, coefficient):
    """index (N,), the loss, d loss / d h at any pixel of a sample (N, r), and (2, r, M) for both
    weights."""
    wide = torch.promote_types(h.dtype, torch.float32)
    w_gate, w_noise = w_gate.to(wide), w_noise.to(wide)
    experts, area = w_gate.shape[1], windows.height * windows.width
    g = windows.cut(h.to(wide)).sum((1, 2)) / area
    clean = logits = torch.mm(g, w_gate)
    if noise is not None:
        raw = torch.mm(g, w_noise)
        sigma = F.softplus(raw) + 0.01
        logits = clean + noise * sigma
    best = logits.argmax(1, keepdim=True)
    index = best.squeeze(1) if index is None else index.clone()
    dpool, dgate = torch.zeros_like(g), g.new_zeros(2, *w_gate.shape)
    if experts == 1 or windows.samples == 0:
        return index, g.new_zeros(()), dpool, dgate
    counts = (index[:, None] == torch.arange(experts, device=h.device)).to(wide).sum(0)
    variation, _ = _squared_variation(counts)
    if noise is None:
        return index, coefficient * 2 * variation, dpool, dgate
    second = logits.scatter(1, best, -torch.inf).argmax(1, keepdim=True)
    highest, next_highest = logits.gather(1, best), logits.gather(1, second)
    inside = logits > next_highest
    t = (clean - torch.where(inside, next_highest, highest)) / sigma
    load_variation, dload = _squared_variation(torch.special.ndtr(t).sum(0))

    dclean = coefficient * dload * torch.exp(-0.5 * t * t) * (2 * torch.pi) ** -0.5 / sigma
    dsigma = -dclean * t
    to_best = torch.where(inside, 0.0, -dclean).sum(1, keepdim=True)
    to_second = torch.where(inside, -dclean, 0.0).sum(1, keepdim=True)
    dlogits = torch.zeros_like(logits).scatter(1, best, to_best).scatter(1, second, to_second)
    dclean = dclean + dlogits
    draw = (dsigma + dlogits * noise) * torch.sigmoid(raw)
    dpool = (torch.mm(dclean, w_gate.t()) + torch.mm(draw, w_noise.t())) / area
    dgate = torch.stack([torch.mm(g.t(), dclean), torch.mm(g.t(), draw)])
    return index, coefficient * (variation + load_variation), dpool, dgate


def _squared_variation(v):
    """CV² of at least two values, and its gradient."""
    mean = v.mean()
    floor = mean.square() + 1e-10
    variation = v.var() / floor
    slope = 2 * (v - mean) / ((v.numel() - 1) * floor)
    return variation, slope - 2 * variation * mean / (floor * v.numel())
