# SPDX-License-Identifier: Apache-2.0
"""segment_anything's own layers with tables that matter, float64, and how fused ones compare."""

import copy

import torch
from black_box import Subject
from budgets import keep
from draws import DEVICE
from segment_anything.modeling.image_encoder import Attention, Block
from stock_runs import by_reference
from torch import nn

from samfast.kernels._common.budget import Budget
from samfast.modules import RelPosAttention, SamBlock


def random_tables(model, seed=0):
    """segment_anything starts its tables at zero, where they change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "rel_pos_" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.3 * values)
    return model


def attention(size, dim=32, heads=2, **options):
    """Tables of ``size`` (height, width)."""
    torch.manual_seed(0)
    options = {"use_rel_pos": True, "input_size": size, **options}
    return random_tables(Attention(dim, heads, **options)).double().to(DEVICE)


def block(window, size=(8, 8), dim=32, heads=2, **options):
    """A block with windows of that side, 0 for a global one on maps of ``size``."""
    torch.manual_seed(0)
    options = {"use_rel_pos": True, "window_size": window, "input_size": size, **options}
    return random_tables(Block(dim, heads, mlp_ratio=2, **options)).double().to(DEVICE)


def subject(stock, batch, height, width, ours=None):
    """The stock layer and its fused form, or the one given, on maps of height × width."""
    if ours is None:
        fused = RelPosAttention.from_attention if type(stock) is Attention else SamBlock.from_block
        ours = fused(copy.deepcopy(stock))
    dim = next(m for m in stock.modules() if isinstance(m, nn.Linear)).in_features
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, height, width, dim, generator=generator, dtype=torch.float64)
    return Subject(ours, stock, x.to(DEVICE))


def check_all_dtypes(subject, low=(torch.float16, torch.bfloat16), beside=()):
    """Result and every gradient but those named ``beside`` in the budget."""
    for dtype in (torch.float64, torch.float32, *low):
        stock, exact = (by_reference(subject.run, "stock", t) for t in (dtype, torch.float64))
        ours, budget = subject.run("ours", dtype), Budget(stock, exact, dtype)
        assert set(ours) == set(budget.exact)
        keep(budget, {name: t for name, t in ours.items() if name not in beside}, some=True)
