# SPDX-License-Identifier: Apache-2.0
"""cellpose's use of an encoder of segment_anything: every block over the whole map, one by one."""

import copy

import torch
from budgets import all_within_budget
from peft_models import DEPTH, block_calls, encoder, moved
from torch import nn

import samfast


class Cells(nn.Module):
    """A literal twin: blocks whose windows were taken away, some left out by chance in training."""

    def __init__(self, drop=0.4):
        super().__init__()
        self.encoder = moved(encoder())
        for block in self.encoder.blocks:
            block.window_size = 0
        self.out = nn.Conv2d(4, 3, 1)
        self.register_buffer("drop", torch.linspace(0, drop, DEPTH))

    def forward(self, x):
        x = self.encoder.patch_embed(x) + self.encoder.pos_embed
        skipped = torch.rand(len(x), DEPTH, device=x.device) < self.drop
        for block, skip in zip(self.encoder.blocks, skipped.T, strict=True):
            y = block(x)
            if self.training:
                kept = (~skip)[:, None, None, None].to(x.dtype)
                y = kept * y + (1 - kept) * x
            x = y
        return self.out(self.encoder.neck(x.permute(0, 3, 1, 2)))


def run(model, x):
    torch.manual_seed(2)
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), [*model.parameters()])
    return [y.detach(), *grads]


def test_cells():
    torch.manual_seed(1)
    stock = Cells().train()
    fused = samfast.fuse(copy.deepcopy(stock))
    x = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(5))
    assert block_calls(fused, x) == DEPTH
    double = copy.deepcopy(stock).double()
    all_within_budget(
        run(fused, x), lambda: run(stock, x), lambda: run(double, x.double()), torch.float32
    )
