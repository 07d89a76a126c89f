# SPDX-License-Identifier: Apache-2.0
"""Small models with SAM's layer names."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from samfast.models import build_sam


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small gain nothing from more, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def toy():
    """ToySam with the same weights at every call."""

    def build(seed=0, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ToySam(**options).eval()

    return build


@pytest.fixture(scope="session")
def _tiny_sam():
    return build_sam("vit_tiny", image_size=64, seed=0)


@pytest.fixture
def tiny_sam(_tiny_sam):
    """A fresh vit_tiny of 64 x 64 pixels, the same weights at every call."""
    return lambda: copy.deepcopy(_tiny_sam)


@pytest.fixture
def move():
    """Fill all trained tensors with random numbers, as training would."""

    def fill(model, seed=1, std=0.05):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += std * torch.randn(parameter.shape, generator=generator)
        return model

    return fill
