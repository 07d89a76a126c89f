# SPDX-License-Identifier: Apache-2.0
"""A twin of AutoGluon's ConvLoRALinear, written from its formulas; classes and names are theirs.

``autogluon_layers`` loads it under the name of AutoGluon's module, for samfast trusts no other.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def identity(x):
    return x


class LoRALayer:
    """What every low-rank layer has."""

    def __init__(self, r, lora_alpha, lora_dropout, merge_weights):
        self.r, self.lora_alpha, self.merge_weights = r, lora_alpha, merge_weights
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else identity
        self.merged = False


class ConvLoRALinear(nn.Linear, LoRALayer):
    """Returns (result, moe_loss)."""

    def __init__(
        self,
        in_features,
        out_features,
        r=0,
        lora_alpha=1,
        lora_dropout=0.0,
        fan_in_fan_out=False,
        merge_weights=False,
        conv_lora_expert_num=None,
        **kwargs,
    ):
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        if r > 0:
            self.lora_A = nn.Parameter(torch.zeros(r, in_features))
            self.lora_B = nn.Parameter(torch.zeros(out_features, r))
            self.scaling = lora_alpha / r
            self.weight.requires_grad = False
            self.lora_moe_gating = MoEGate(r, conv_lora_expert_num)
            self.upsample_ratios = [i + 1 for i in range(conv_lora_expert_num)]
            experts = (nn.Conv2d(r, r, 3, padding=1) for _ in self.upsample_ratios)
            self.lora_moe_experts = nn.ModuleList(nn.Sequential(e, nn.GELU()) for e in experts)
            self.num_experts = conv_lora_expert_num
            self.multiply_by_gates = False
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T

    def T(self, w):
        return w.T if self.fan_in_fan_out else w

    def forward(self, x):
        y = F.linear(x, self.T(self.weight), self.bias)
        if self.r > 0:
            h = self.lora_dropout(x) @ self.lora_A.T
            shape = h.shape
            if h.dim() == 3:
                side = int(math.sqrt(shape[1]))
                h = h.reshape(shape[0], side, side, shape[2])
            h = h.permute(0, 3, 1, 2).contiguous()
            gates, moe_loss = self.lora_moe_gating(h)
            parts = SparseDispatcher(self.num_experts, gates)
            z = h + parts.gathered([self.expert(i, p) for i, p in enumerate(parts.split(h))])
            z = z.permute(0, 2, 3, 1).reshape(shape)
            y += self.scaling * (z @ self.lora_B.T)
        return y, moe_loss

    def expert(self, i, h):
        if len(h) == 0:
            return None
        ratio, size = self.upsample_ratios[i], h.shape[2:]
        if ratio == 1:
            return self.lora_moe_experts[i](h)
        h = self.lora_moe_experts[i](F.interpolate(h, scale_factor=ratio, mode="bicubic"))
        return F.interpolate(h, size=size, mode="bicubic")


class MoEGate(nn.Module):
    """The noisy choice of one expert for each sample, and the loss that balances the choices."""

    def __init__(self, d, M=4, K=1, noisy_gating=True):
        super().__init__()
        self.M, self.k, self.noisy_gating = M, K, noisy_gating
        self.gap = nn.AdaptiveAvgPool2d((1, 1))
        self.w_gate = nn.Parameter(torch.zeros(d, M))
        self.w_noise = nn.Parameter(torch.zeros(d, M))
        self.softplus, self.softmax = nn.Softplus(), nn.Softmax(1)
        self.register_buffer("mean", torch.tensor([0.0]))
        self.register_buffer("std", torch.tensor([1.0]))

    def forward(self, h, least=0.01):
        pooled = self.gap(h).flatten(1)
        clean = logits = pooled @ self.w_gate
        noisy = self.training and self.noisy_gating
        if noisy:
            spread = self.softplus(pooled @ self.w_noise) + least
            logits = clean + torch.randn_like(clean) * spread
        top, index = logits.topk(min(self.k + 1, self.M), dim=1)
        zeros = torch.zeros_like(logits, requires_grad=True).float()
        gates = zeros.scatter(1, index[:, : self.k], self.softmax(top[:, : self.k]).float())
        load = (gates > 0).sum(0)
        if noisy and self.k < self.M:
            inside = logits > top[:, self.k :]
            bar = torch.where(inside, top[:, self.k :], top[:, self.k - 1 : self.k])
            standard = torch.distributions.Normal(self.mean, self.std)
            load = standard.cdf((clean - bar) / spread).sum(0)
        return gates, 0.01 * (self.cv_squared(gates.sum(0)) + self.cv_squared(load))

    def cv_squared(self, v):
        """Squared coefficient of variation."""
        v = v.float()
        if len(v) == 1:
            return 0 * v
        return v.var() / (v.mean() ** 2 + 1e-10)


class SparseDispatcher:
    """Sorts samples by their expert and back."""

    def __init__(self, experts, gates):
        chosen = gates.argmax(1)
        self.where = [(chosen == e).nonzero()[:, 0] for e in range(experts)]

    def split(self, h):
        return [h[index] for index in self.where]

    def gathered(self, parts):
        kept = [part for part in parts if part is not None]
        order = torch.cat(self.where)
        made = torch.zeros((len(order), *kept[0].shape[1:]), requires_grad=True)
        return made.index_add(0, order, torch.cat(kept).float())
