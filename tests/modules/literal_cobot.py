# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT as its paper and code write it, in plain PyTorch."""

import torch
import torch.nn.functional as F
from adapt_former_layers import LiteralAdaptFormer
from torch import nn

from samfast.adapters.published import PublishedNames


def quaternion(head):
    """W of y = x W from the quarters r, i, j, k, block row by block row."""
    r, i, j, k = head.unbind()
    return torch.cat(
        [
            torch.cat([r, i, j, k], dim=1),
            torch.cat([-i, r, k, -j], dim=1),
            torch.cat([-j, -k, r, i], dim=1),
            torch.cat([-k, j, -i, r], dim=1),
        ]
    )


class LiteralCobot(PublishedNames, nn.Linear):
    """Packed qkv with LoRA on q and v, coefficients and heads applied token by token."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features, dtype=torch.float64)
        self.first, self.names = like.first, like.published()
        for name, parameter in like.adapter_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty_like(parameter)))

    def published(self):
        return self.names

    def state_problem(self, state):
        return None

    def forward(self, x):
        y = super().forward(x)
        coefficients = (self.FacT_c[0] @ self.FacT_p).t()
        updates = []
        parts = zip(
            self.lora_A.chunk(2), self.lora_B.chunk(2), self.gamma.chunk(2), self.heads, strict=True
        )
        for m, (a, b, gamma, head) in enumerate(parts, self.first):
            h = (coefficients[m] + gamma) * F.linear(x, a)
            updates.append(F.linear(torch.matmul(h, quaternion(head)), b))
        q, v = updates
        return y + torch.cat([q, torch.zeros_like(q), v], dim=-1)


class LiteralCobotAdaptFormer(PublishedNames, LiteralAdaptFormer):
    """AdaptFormer with coefficients and a head applied to its bottleneck, token by token."""

    def __init__(self, like):
        super().__init__(like)
        self.first, self.names = like.first, like.published()
        for name in ("FacT_c", "FacT_p", "gamma", "heads"):
            like_one = like.get_parameter(name)
            self.register_parameter(name, nn.Parameter(like_one.detach().clone()))

    def published(self):
        return self.names

    def state_problem(self, state):
        return None

    def between(self, h):
        coefficients = (self.FacT_c[0] @ self.FacT_p)[:, self.first]
        return torch.matmul((coefficients + self.gamma) * h, quaternion(self.heads[0]))
