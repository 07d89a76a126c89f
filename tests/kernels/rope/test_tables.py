# SPDX-License-Identifier: Apache-2.0
"""Tables: those of SAM 3's formula, those that models have, and the rows of padding."""

import math

import pytest
import torch
from draws import DEVICE

from samfast.functional import axial_tables, tables_of
from samfast.kernels._common.windows import Windows
from samfast.kernels.rope import tables
from samfast.kernels.rope.engine import pad_rows


@pytest.mark.parametrize("order", ["xy", "yx"])
def test_the_formula(order):
    """By numbers of Python; float32 angles up to 10 are good to 2⁻²¹ of one."""
    height, width, head_dim, theta, scale, offset = 3, 5, 8, 100.0, 1.5, 0.25
    cos, sin = axial_tables(
        height, width, head_dim, theta=theta, scale=scale, offset=offset, order=order
    )
    assert cos.shape == sin.shape == (15, 4) and cos.dtype == sin.dtype == torch.float32
    for row in range(height * width):
        y, x = divmod(row, width)
        for i in range(head_dim // 2):
            first = i < head_dim // 4
            place = x if first == (order == "xy") else y
            power = 4 * (i % (head_dim // 4)) / head_dim
            angle = (place * scale + offset) * theta**-power
            assert math.isclose(cos[row, i].item(), math.cos(angle), abs_tol=2.0**-20)
            assert math.isclose(sin[row, i].item(), math.sin(angle), abs_tol=2.0**-20)


@pytest.mark.slow_on_cpu  # the import of transformers
def test_those_of_hugging_face():
    """Sam3's own, to the bit: windows, and a global map whose positions are scaled."""
    modeling = pytest.importorskip("transformers.models.sam3.modeling_sam3")
    from transformers.models.sam3.configuration_sam3 import Sam3ViTConfig

    config = Sam3ViTConfig(hidden_size=64, num_attention_heads=2, image_size=56, patch_size=14,
                           window_size=3)  # fmt: skip
    for window, side in ((3, 3), (0, 4)):
        layer = modeling.Sam3ViTLayer(config, window)
        theirs = layer.rotary_emb(torch.zeros(1), layer.position_ids)
        ours = axial_tables(side, side, 32, scale=3 / side)
        for mine, view, given in zip(ours, tables_of(*theirs), theirs, strict=True):
            assert torch.equal(mine, view)
            assert view.data_ptr() == given.data_ptr()


def test_views_of_both_forms():
    angles = torch.randn(6, 4)
    cos, sin = angles.cos(), angles.sin()
    turn = torch.polar(torch.ones(6, 4), angles)
    real, imaginary = tables_of(turn)
    assert torch.equal(torch.complex(real, imaginary), turn)
    assert real.untyped_storage().data_ptr() == turn.untyped_storage().data_ptr()
    for pairs, twice in (
        ("interleaved", lambda t: t.repeat_interleave(2, 1)),
        ("halves", lambda t: t.repeat(1, 2)),
    ):
        given = twice(cos), twice(sin)
        made = tables_of(*given, pairs=pairs)
        assert torch.equal(made[0], cos) and torch.equal(made[1], sin)
        assert [t.data_ptr() for t in made] == [t.data_ptr() for t in given]
        other = "halves" if pairs == "interleaved" else "interleaved"
        sentence = f"cos does not have each value twice, as pairs='{other}' needs"
        with pytest.raises(ValueError, match=sentence):
            tables_of(*given, pairs=other)
        assert tables_of(*given, pairs=other, check=False)[0].shape == (6, 4)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((torch.zeros(6, 4),), r"expected complex .* got one torch.float32 tensor \(6, 4\)"),
        (
            (torch.zeros(2, 6, 4).to(torch.complex64),),
            r"got one torch.complex64 tensor \(2, 6, 4\)",
        ),
        ((torch.zeros(6, 8), torch.zeros(6, 4)), r"got torch.float32 \(6, 8\) and .* \(6, 4\)"),
        ((torch.zeros(6, 7), torch.zeros(6, 7)), "even head_dim"),
        ((torch.zeros(6, 8), torch.zeros(6, 8).half()), r"and torch.float16 \(6, 8\)"),
        ((torch.zeros(8), torch.zeros(8)), r"got torch.float32 \(8,\)"),
    ],
)
def test_neither_form(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        tables_of(*given)
    with pytest.raises(ValueError, match="pairs is 'both'"):
        tables_of(*given, pairs="both")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(height=0), "height is 0; it must be a whole number of at least 1"),
        (dict(width=2.0), "width is 2.0; it must be"),
        (dict(head_dim=6), "head_dim is 6; two axes of pairs need a multiple of 4"),
        (dict(order="hw"), "order is 'hw'; it must be one of xy, yx"),
    ],
)
def test_bad_sizes(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        axial_tables(**{"height": 2, "width": 2, "head_dim": 8, **arguments})


@pytest.mark.parametrize(
    "windows",
    [
        Windows(2, 3, 5, 2, 3),
        Windows(1, 4, 4, 4, 4),
        Windows(1, 2, 3, 5, 3),
        Windows(1, 5, 4, 3, 2),
    ],
    ids=str,
)
def test_rows_of_padding_lie_as_the_pad_buffer(windows):
    """A window cut from an image and its padding has the table's rows in order."""
    table = torch.arange(windows.height * windows.width * 2.0, device=DEVICE).view(-1, 2)
    image, pads = tables.image_rows(table, windows), pad_rows(table, windows)
    assert image.shape == (windows.image_height, windows.image_width, 2)
    assert pads.shape == (windows.pads, 2)
    one = windows._replace(batch=1)
    cut = one.cut(image.flatten(0, 1), pads)
    assert torch.equal(cut.flatten(1, 2), table.expand(one.samples, -1, -1))


def test_tables_on_other_devices():
    meta = torch.ones(3, 4, device="meta")
    assert [t.shape for t in tables_of(meta, meta)] == [(3, 2), (3, 2)]
    with pytest.raises(ValueError, match="cos is on cpu but sin is on meta"):
        tables_of(torch.ones(3, 4), meta)


@pytest.mark.parametrize("theta", [0.0, -1.0, math.nan, math.inf])
def test_a_base_that_gives_no_angles_is_refused(theta):
    with pytest.raises(ValueError, match=f"theta is {theta}; it must be a finite number above 0"):
        axial_tables(2, 2, 8, theta=theta)
