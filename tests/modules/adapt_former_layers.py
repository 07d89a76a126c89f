# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer as the paper draws it, in plain PyTorch, alone and in segment_anything's block."""

import copy

import torch
import torch.nn.functional as F
from draws import DEVICE
from sam_layers import block, subject
from segment_anything.modeling.common import MLPBlock
from torch import nn

from samfast.modules import AdaptFormerMlp, CobotAdaptFormerMlp, SamBlock
from samfast.modules.cobot import relation


class LiteralAdaptFormer(MLPBlock):
    """With the authors' names; its parameters are those of ``like``, copied."""

    def __init__(self, like):
        super().__init__(like.lin1.in_features, like.lin1.out_features)
        self.lin1, self.lin2, self.act = (
            copy.deepcopy(m) for m in (like.lin1, like.lin2, like.act)
        )
        self.adapter_layer_norm_before = copy.deepcopy(like.adapter_layer_norm_before)
        self.down_proj, self.up_proj = copy.deepcopy(like.down_proj), copy.deepcopy(like.up_proj)
        self.dropout = like.dropout

    def forward(self, x):
        n = self.adapter_layer_norm_before(x)
        z = F.dropout(F.relu(self.between(self.down_proj(n))), self.dropout, self.training)
        return super().forward(x) + self.up_proj(z)

    def between(self, h):
        return h


def fill(mlp, seed=5):
    """Numbers in all of the adapter, as training would leave them.

    The bottleneck is mostly off or mostly on: near zero rounding decides what a ReLU lets through.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mlp.adapter_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values * (0.1 if name.endswith("proj.weight") else 1.0))
        signs = 1.0 - 2.0 * (torch.arange(mlp.bottleneck, device=mlp.down_proj.bias.device) % 2)
        mlp.down_proj.bias.copy_(signs * (1 + 0.2 * mlp.down_proj.bias.abs()))
        if isinstance(mlp, CobotAdaptFormerMlp):  # near one and the identity, for the same reason
            mlp.FacT_c.mul_(0.2)
            mlp.gamma.mul_(0.1).add_(1.0)
            mlp.heads.mul_(0.05)
            mlp.heads[0, 0] += torch.eye(mlp.bottleneck // 4, dtype=mlp.heads.dtype)
    return mlp


def adapted_mlp(dim=40, hidden=56, bottleneck=6, dropout=0.0):
    torch.manual_seed(0)
    options = {"bottleneck": bottleneck, "dropout": dropout, "dtype": torch.float64}
    return fill(AdaptFormerMlp(dim, hidden, **options)).to(DEVICE)


def cobot_mlp(dim=40, hidden=56, bottleneck=8, dropout=0.0):
    """The second of three layers that share."""
    torch.manual_seed(0)
    shared = relation(bottleneck, 3, torch.empty(0, dtype=torch.float64))
    options = {"shared": shared, "index": 1, "dtype": torch.float64}
    return fill(CobotAdaptFormerMlp(dim, hidden, nn.GELU, bottleneck, dropout, **options)).to(
        DEVICE
    )


def with_side(stock, bottleneck=6, dropout=0.0, kind=AdaptFormerMlp):
    """The block with the branch, filled, beside its MLP."""
    stock.mlp = fill(kind.from_mlp(stock.mlp, bottleneck, dropout))
    return stock


def sided(
    window,
    batch,
    height,
    width,
    change=None,
    memory="fast",
    trained=("",),
    literal=LiteralAdaptFormer,
    **options,
):
    """The literal block and the fused one; change: what is done to the block before."""
    stock = with_side(block(window, (height, width)), **options)
    if change is not None:
        change(stock)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    fused = SamBlock.from_block(copy.deepcopy(stock), memory)
    stock.mlp = literal(stock.mlp)
    return subject(stock, batch, height, width, ours=fused)
