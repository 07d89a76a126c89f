# SPDX-License-Identifier: Apache-2.0
"""A small model with SAM's layer names. Not in conftest, whose classes cannot be pickled."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lin1 = nn.Linear(width, 2 * width)
        self.lin2 = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.lin2(F.gelu(self.lin1(x)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = nn.Conv2d(3, width, 4, 4)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, images):
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x * self.scale


class ToySam(nn.Module):
    """Two blocks with SAM's names; the decoder has a norm with statistics and a lin1 of its own.

    images (B, 3, 16, 16) -> (B, 16)
    """

    def __init__(self, width=12, depth=2):
        super().__init__()
        self.image_encoder = Encoder(width, depth)
        self.mask_decoder = nn.Sequential()
        self.mask_decoder.norm = nn.BatchNorm1d(16)
        self.mask_decoder.lin1 = nn.Linear(width, 1)

    def forward(self, images):
        x = self.image_encoder(images).float()
        return self.mask_decoder(x).squeeze(-1)
