# SPDX-License-Identifier: Apache-2.0
"""KroneckerLinear written out, and one that is not at its start."""

import torch
import torch.nn.functional as F
from torch import nn


class LiteralKronecker(nn.Linear):
    """The update as a matrix, by torch.kron."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features, dtype=torch.float64)
        for name, parameter in like.adapter_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty_like(parameter)))
        self.scaling = like.alpha / like.rank

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            parts = zip(self.kron_rules, self.kron_left, self.kron_right, strict=True)
            delta = sum(torch.kron(a, u @ v.mT) for a, u, v in parts)
        return super().forward(x) + self.scaling * F.linear(x, delta.to(x.dtype))


class LiteralFactors(LiteralKronecker):
    """The update as LoRA, whose down-projection multiplies zeros too: an infinity among x, where
    the loss is lost anyway, makes all of kron_rules' gradient NaN, not a column of it alone."""

    def forward(self, x):
        eye = torch.eye(self.kron_rules.shape[1], dtype=x.dtype)
        a = torch.cat([torch.kron(eye, v.t().contiguous()) for v in self.kron_right])
        parts = zip(self.kron_rules, self.kron_left, strict=True)
        b = torch.cat([torch.kron(rule, u) for rule, u in parts], dim=1)
        update = F.linear(F.linear(x, a.to(x.device)), b)
        return nn.Linear.forward(self, x) + self.scaling * update


def filled(module, seed=3):
    """The module with a left factor that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        left = 0.5 * torch.randn(module.kron_left.shape, generator=generator)
        module.kron_left.copy_(left)
    return module
