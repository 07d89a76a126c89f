# SPDX-License-Identifier: Apache-2.0
"""Boxes as a list with a number of its own for each image; prompts that mean nothing."""

import pytest
import torch
from budgets import all_within_budget
from stock_loop import random_boxes, stock

from samfast.models import decode, encode, segment

SIZE = (40, 60)
IMAGES = torch.arange(3 * 3 * 40 * 60).view(3, 3, *SIZE).mul(7919).remainder(256).to(torch.uint8)
NAN = float("nan")

pytestmark = pytest.mark.usefixtures("seeded")


def one_by_one(sam, images, boxes):
    """segment_anything's loop; an image without boxes has no masks."""
    images = [image[None] for image in images]
    return [
        stock(sam, image, own[None])[0] if len(own) else image.new_zeros(0, *SIZE).double()
        for image, own in zip(images, boxes, strict=True)
    ]


@pytest.mark.parametrize("counts", [(1, 2, 0), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_list_of_boxes_gives_each_image_its_masks(small, small_double, counts, chunk):
    boxes = [random_boxes(1, count, SIZE)[0] for count in counts]
    masks = segment(small, IMAGES, boxes, decoder_chunk=chunk)
    assert [tuple(own.shape) for own in masks] == [(count, *SIZE) for count in counts]
    known = [i for i, count in enumerate(counts) if count]
    few, some = IMAGES[known], [boxes[i] for i in known]
    all_within_budget(
        {str(i): masks[i] for i in known},
        lambda: dict(zip(map(str, known), one_by_one(small, few, some), strict=True)),
        lambda: dict(zip(map(str, known), one_by_one(small_double, few, some), strict=True)),
        torch.float32,
    )


def test_a_list_of_equal_counts_is_the_tensor(small):
    boxes = random_boxes(3, 2, SIZE)
    whole = segment(small, IMAGES, boxes)
    assert torch.equal(torch.stack(segment(small, IMAGES, list(boxes))), whole)
    embeddings = encode(small, IMAGES)
    assert torch.equal(torch.stack(decode(small, embeddings, SIZE, tuple(boxes))), whole)


def test_what_is_padded_gives_no_gradient(small):
    boxes = [random_boxes(1, count, SIZE)[0] for count in (1, 3, 1)]
    others = random_boxes(3, 3, SIZE)
    for row, own in zip(others, boxes, strict=True):
        row[: len(own)] = own

    def gradients(masks):
        small.zero_grad()
        sum(own.square().sum() for own in masks).backward()
        return {n: p.grad.clone() for n, p in small.named_parameters() if p.grad is not None}

    ours = gradients(segment(small, IMAGES, boxes))
    rows = segment(small, IMAGES, others)
    expected = gradients([row[: len(own)] for row, own in zip(rows, boxes, strict=True)])
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_empty_lists(small):
    none = torch.zeros(0, 4)
    assert segment(small, IMAGES[:0], []) == []
    masks = segment(small, IMAGES, [none, none, none])
    assert [tuple(own.shape) for own in masks] == [(0, *SIZE)] * 3


BOX = torch.tensor([[1.0, 2.0, 30.0, 20.0]])


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"boxes": [BOX, BOX]}, ValueError, "boxes are a list of 2 tensors for 3 images$"),
        ({"boxes": [BOX, BOX, [1]]}, TypeError, "boxes of image 2 are a list, not a tensor$"),
        ({"boxes": [BOX, BOX[0], BOX]}, ValueError, r"image 1 have shape \(4,\), not \(N, 4\)$"),
        ({"boxes": [BOX, BOX.bool(), BOX]}, TypeError, "boxes of image 1 are torch.bool"),
        ({"boxes": [BOX, BOX, BOX.to("meta")]}, ValueError, "boxes of image 2 are on meta"),
        ({"boxes": {0: BOX}}, TypeError, "boxes are a dict, not a tensor or a list of them$"),
        (
            {"boxes": [BOX, BOX, torch.cat([BOX, BOX.flip(1)])]},
            ValueError,
            r"boxes of image 2 have \(20, 30, 2, 1\) in row \(1,\); .* with x0 <= x1 and y0 <= y1$",
        ),
        (
            {"boxes": torch.tensor([1, 2, 30, 20]).repeat(3, 2, 1) * torch.tensor([1, 1, 1, -1])},
            ValueError,
            r"boxes have \(1, 2, 30, -20\) in row \(0, 0\); a box must be finite numbers x0, y0",
        ),
        ({"boxes": BOX.repeat(3, 1) * NAN}, ValueError, r"boxes have \(nan, nan, nan, nan\) in ro"),
        (
            {"boxes": BOX.repeat(3, 1).masked_fill(torch.eye(3, 4).bool(), float("inf"))},
            ValueError,
            r"boxes have \(inf, 2, 30, 20\) in row \(0,\)",
        ),
        (
            {"points": (torch.full((3, 2, 2), NAN), torch.tensor([[-1, -1], [-1, 0], [1, 1]]))},
            ValueError,
            r"point \(1, 1\) has coordinates \(nan, nan\); they must be finite$",
        ),
        (
            {"points": ([torch.zeros(1, 2)] * 3, [torch.zeros(1)] * 3)},
            TypeError,
            "point coordinates are a list, not a tensor; stack them, and pad with the label -1$",
        ),
        (
            {"boxes": [BOX] * 3, "points": (torch.zeros(3, 1, 2), torch.ones(3, 1))},
            ValueError,
            r"because boxes are a list of tensors; .* as one tensor \(3, N, 4\)$",
        ),
    ],
)
def test_prompts_that_mean_nothing(small, arguments, kind, sentence, monkeypatch):
    monkeypatch.setattr(small.image_encoder, "forward", None)  # they are refused before its work
    with pytest.raises(kind, match=sentence):
        segment(small, IMAGES, **arguments)


def test_padding_points_may_be_anywhere(small):
    labels = torch.tensor([[1, -1]] * 3)
    coords = torch.tensor([[[4.0, 5.0], [0.0, 0.0]]] * 3)
    expected = segment(small, IMAGES, points=(coords, labels))
    coords[:, 1] = NAN
    assert torch.equal(segment(small, IMAGES, points=(coords, labels)), expected)
