# SPDX-License-Identifier: Apache-2.0
"""The specification against segment_anything's own functions.

In float64, to far less than float32 could tell: both sides round.
"""

from functools import partial

import pytest
import torch
from budgets import all_within_budget
from draws import DEVICE

from .cases import MapCase, WindowCase

image_encoder = pytest.importorskip("segment_anything.modeling.image_encoder")


def stock_attention(q, k, v, table_h, table_w):
    """segment_anything's, from (B, heads, H, W, head_dim)."""
    batch, heads, height, width, head_dim = q.shape
    q, k, v = (t.reshape(batch * heads, height * width, head_dim) for t in (q, k, v))
    logits = (q * head_dim**-0.5) @ k.transpose(-2, -1)
    size = (height, width)
    logits = image_encoder.add_decomposed_rel_pos(logits, q, table_h, table_w, size, size)
    return (logits.softmax(-1) @ v).view(batch, heads, height, width, head_dim)


def stock_windows(case, qkv, table_h, table_w, bias):
    """segment_anything's block around its attention, where zeros of the norm become the bias."""
    side = case.window[0]
    parts, padded = image_encoder.window_partition(qkv - bias, side)
    q, k, v = (parts + bias).unflatten(3, (3, case.heads, -1)).permute(3, 0, 4, 1, 2, 5)
    out = stock_attention(q, k, v, table_h, table_w).movedim(1, 3).flatten(3)
    return image_encoder.window_unpartition(out, side, padded, qkv.shape[1:3])


def compare(case, stock):
    def run(call):
        leaves, dout = case.tensors(torch.float64)
        out = call(leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    ours, theirs = (
        run(lambda leaves: case.call(leaves, "reference")),
        partial(run, lambda leaves: stock(*leaves)),
    )
    all_within_budget(ours, theirs, theirs, torch.float64, case.names)


@pytest.mark.parametrize(
    "case",
    [
        MapCase(),
        MapCase(height=14, width=14, head_dim=80),
        MapCase(height=1, width=1),
        MapCase(height=6, width=7, tables=(15, 9)),
        MapCase(height=6, width=7, tables=(4, 27)),
    ],
    ids=lambda case: case.id,
)
def test_one_map(case):
    compare(case, stock_attention)


@pytest.mark.parametrize(
    "case",
    [WindowCase(), WindowCase(height=5, width=9), WindowCase(height=28, width=14)],
    ids=lambda case: case.id,
)
def test_windows_and_their_padding(case):
    compare(case, lambda *leaves: stock_windows(case, *leaves))


def test_rows_of_the_padding_stand_line_by_line():
    """Given all 3·D columns of the padding as pad_h, an image padded by hand gives the same."""
    case = WindowCase(batch=2, height=5, width=7, window=(4, 5), rank=96)
    (qkv, table_h, table_w, bias, pad_h, _), _ = case.tensors(torch.float64)
    eye = torch.eye(96, dtype=torch.float64, device=DEVICE)
    ours = case.call((qkv, table_h, table_w, bias * 0, pad_h, eye), "reference")
    padded = qkv.new_empty(2, 8, 10, 96)
    for image in range(2):
        rows = iter(pad_h.view(2, case.windows.pads, 96)[image])
        for y in range(8):
            for x in range(10):
                padded[image, y, x] = qkv[image, y, x] if y < 5 and x < 7 else next(rows)
    whole = WindowCase(batch=2, height=8, width=10, window=(4, 5), rank=None)
    theirs = whole.call((padded, table_h, table_w), "reference")[:, :5, :7]
    assert torch.equal(ours, theirs)
