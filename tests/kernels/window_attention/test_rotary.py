# SPDX-License-Identifier: Apache-2.0
"""Rotary positions in the public function: turned, then attended to, padding included."""

import pytest
import torch
import torch.nn.functional as F

from samfast.functional import axial_tables, window_attention

HEADS, SIZE = 2, 16


def literal(qkv, window, cos, sin, bias, halves):
    """Windows cut by hand, padding filled with the bias, torch's own attention."""
    height, width = (-side % window for side in qkv.shape[1:3])
    rows = bias.expand(*qkv.shape[:1], qkv.shape[1] + height, qkv.shape[2] + width, -1).clone()
    rows[:, : qkv.shape[1], : qkv.shape[2]] = qkv
    cut = rows.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
    q, k, v = cut.flatten(3, 4).unflatten(-1, (3, HEADS, SIZE)).permute(4, 0, 1, 2, 5, 3, 6)

    def turn(t):
        a, b = t.unflatten(-1, (2, -1) if halves else (-1, 2)).unbind(-2 if halves else -1)
        parts = a * cos - b * sin, b * cos + a * sin
        return torch.cat(parts, -1) if halves else torch.stack(parts, -1).flatten(-2)

    out = F.scaled_dot_product_attention(turn(q), turn(k), v).transpose(3, 4).flatten(4)
    out = out.unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out[:, : qkv.shape[1], : qkv.shape[2]]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("window", "pairs"), [(3, "interleaved"), (4, "halves"), (5, "halves")])
def test_turned_keys_of_padding_too(window, pairs, backend):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 4, 8, 3 * HEADS * SIZE, generator=generator, dtype=torch.float64)
    bias = torch.randn(3 * HEADS * SIZE, generator=generator, dtype=torch.float64)
    tables = [t.double() for t in axial_tables(window, window, SIZE)]
    leaves = qkv.requires_grad_(), bias.requires_grad_()
    ours = window_attention(
        qkv, HEADS, window, cos=tables[0], sin=tables[1], pairs=pairs, pad_bias=bias,
        backend=backend,
    )  # fmt: skip
    exact = literal(qkv, window, *tables, bias, pairs == "halves")
    dy = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, leaves, dy, materialize_grads=True)),
        (exact, *torch.autograd.grad(exact, leaves, dy, materialize_grads=True)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_one_table_alone_is_refused():
    cos, _ = axial_tables(2, 2, SIZE)
    with pytest.raises(ValueError, match="sin is missing; rope needs both tables"):
        window_attention(torch.zeros(1, 2, 2, 3 * HEADS * SIZE), HEADS, 2, cos=cos)


def test_other_pairs_are_refused():
    with pytest.raises(
        ValueError, match="pairs is 'thirds'; it must be one of interleaved, halves"
    ):
        window_attention(torch.zeros(1, 2, 2, 3 * HEADS * SIZE), HEADS, 2, pairs="thirds")
