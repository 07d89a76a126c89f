# SPDX-License-Identifier: Apache-2.0
"""Conv-LoRA as published, eagerly and one expert after the other, for tests to compare with.

Its parameters have the names and the packed shapes of ConvLoraLinear, so that an optimizer treats
both alike; its state dict has the published names by a translation of its own.
"""

import re

import torch
from torch import nn
from torch.nn import functional as F

PACKED = {"weight": "expert_weight", "bias": "expert_bias"}


def translated(published: dict) -> dict:
    """Tensors by the parameters' names from those by the published names."""
    ours, parts = {}, {"weight": {}, "bias": {}}
    for name, value in published.items():
        if match := re.fullmatch(r"lora_moe_experts\.(\d+)\.0\.(weight|bias)", name):
            parts[match[2]][int(match[1])] = value
        elif name not in ("lora_moe_gating.mean", "lora_moe_gating.std"):
            ours[name.removeprefix("lora_moe_gating.")] = value
    for kind, experts in parts.items():
        if experts:
            ours[PACKED[kind]] = torch.stack([experts[i] for i in range(len(experts))])
    return ours


class LiteralConvLora(nn.Linear):
    """(N, H, W, D) or (N, side², D) -> y, balancing loss. Top-1, as the authors' code computes it.

    like: the ConvLoraLinear whose values it starts from; weight and bias are shared with it
    """

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features, like.bias is not None, device="meta")
        self.weight, self.bias = like.weight, like.bias
        for name, value in like.adapter_parameters():
            setattr(self, name, nn.Parameter(value.detach().clone()))
        self.scaling, self.ratios = like.alpha / like.rank, like.ratios
        self.groups = like.rank if like.depthwise else 1

    def forward(self, x, noise=None, expert_index=None):
        y = F.linear(x, self.weight, self.bias)
        if x.dim() == 3:
            side = round(x.shape[1] ** 0.5)
            x = x.reshape(len(x), side, side, -1)
        h = F.linear(x, self.lora_A).permute(0, 3, 1, 2)
        if self.training and noise is None:
            noise = torch.randn(len(h), len(self.ratios), device=x.device)
        index, loss = self.gate(h.mean((2, 3)), noise, expert_index)
        updated = [self.expert(h[n : n + 1], e) for n, e in enumerate(index.tolist())]
        z = h + (torch.cat(updated) if updated else h * self.expert_weight.sum())
        z = z.permute(0, 2, 3, 1).reshape(*y.shape[:-1], -1)
        return y + self.scaling * F.linear(z, self.lora_B), loss

    def expert(self, z, e):
        ratio, size = self.ratios[e], z.shape[2:]
        kernel, bias = self.expert_weight[e], self.expert_bias[e]
        u = z if ratio == 1 else F.interpolate(z, scale_factor=ratio, mode="bicubic")
        v = F.gelu(F.conv2d(u, kernel, bias, padding=1, groups=self.groups))
        return v if ratio == 1 else F.interpolate(v, size=size, mode="bicubic")

    def gate(self, g, noise, forced):
        clean = logits = g @ self.w_gate
        experts = clean.shape[1]
        if noise is not None:
            sigma = F.softplus(g @ self.w_noise) + 0.01
            logits = clean + noise.to(clean.dtype) * sigma
        index = logits.argmax(1) if forced is None else forced
        importance = F.one_hot(index, experts).to(clean.dtype).sum(0)
        if noise is None or experts == 1:
            load = importance
        else:
            first, second = logits.topk(2, dim=1).values.split(1, dim=1)
            threshold = torch.where(logits > second, second, first)
            load = torch.special.ndtr((clean - threshold) / sigma).sum(0)
        return index, 0.01 * (variation(importance) + variation(load))

    def state_dict(self, *args, prefix="", **kwargs):
        state = {}
        for name, value in super().state_dict(*args, **kwargs).items():
            kind = {packed: kind for kind, packed in PACKED.items()}.get(name)
            if kind is not None:
                state |= {f"lora_moe_experts.{i}.0.{kind}": v for i, v in enumerate(value)}
            else:
                state[f"lora_moe_gating.{name}" if name.startswith("w_") else name] = value
        constants = {"mean": torch.zeros(1), "std": torch.ones(1)}
        return state | {f"lora_moe_gating.{name}": value for name, value in constants.items()}

    def load_state_dict(self, state_dict, **options):
        return super().load_state_dict(translated(state_dict), **options)


def variation(v):
    """Squared coefficient of variation."""
    return v.var() / (v.mean() ** 2 + 1e-10) if len(v) > 1 else v.sum() * 0
