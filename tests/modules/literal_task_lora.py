# SPDX-License-Identifier: Apache-2.0
"""TA-LoRA as its authors' code runs it, in plain PyTorch: the update's weight of every task."""

import torch
import torch.nn.functional as F
from torch import nn


class LiteralTaskLora(nn.Linear):
    """One task for all of x, or one for each equal part of the batch."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features, dtype=torch.float64)
        for name, parameter in like.adapter_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty_like(parameter)))
        self.scaling, self.ranges, self.entries = like.scaling, like.ranges, like.entries

    def forward(self, x):
        factors = (self.td_G, self.td_U2, self.td_U1, self.td_U3)
        deltas = torch.einsum("abv,ob,ia,tv->toi", *factors)
        parts = x.chunk(len(self.entries)) if len(x) else [x]
        updates = [F.linear(part, deltas[t]) for part, t in zip(parts, self.entries, strict=False)]
        update = self.scaling * torch.cat(updates)
        y = super().forward(x)
        if self.ranges is None:
            return y + update
        length = self.out_features // 3
        starts = [start for start, _ in self.ranges]
        given = dict(zip(starts, update.split(length, -1), strict=True))
        zero = torch.zeros_like(y[..., :length])
        return y + torch.cat([given.get(i * length, zero) for i in range(3)], -1)
