# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT as its paper and code write it, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from samfast.kernels.cobot_fold.reference import quaternion
from samfast.modules.published import PublishedNames


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
