# SPDX-License-Identifier: Apache-2.0
"""segment against segment_anything's own loop over images."""

import copy
from functools import partial

import pytest
import torch
from budgets import keep, within_budget
from stock_loop import KINDS, SIDE, prompts, random_boxes, random_points, run, stock

from samfast.kernels._common.budget import Budget
from samfast.models import decode, encode, segment, unused_by_segment

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.slow_on_cpu(but=["points, ragged-size4-float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("kind", "size"),
    [*((kind, (50, 95)) for kind in KINDS), ("none", (SIDE, SIDE)), ("three boxes", (95, 1))],
)
def test_equals_the_stock_loop(small, small_double, kind, size, dtype):
    """Those without a prompt are in test_heads.py, boxes with points in test_segment_chunks.py."""
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    arguments = prompts(kind, 2, size)
    weights = torch.randn(*size)
    exact = partial(run, stock, small_double, images, arguments, weights)

    def moved(results):
        return {name: values for name, values in results.items() if values.any()}

    sam = small if dtype == torch.float32 else small_double
    budget = Budget(partial(run, stock, sam, images, arguments, weights), exact, dtype)
    ours = moved(run(segment, sam, images, arguments, weights))
    assert set(ours) == set(moved(budget.exact))
    keep(budget, ours, some=True)


def test_unused_parameters_are_those_without_a_gradient(small):
    size = (SIDE, 40)
    images = torch.rand(1, 3, *size) * 255
    used = set()
    for kind in KINDS:
        used |= set(run(segment, small, images, prompts(kind, 1, size), torch.ones(size)))
    names = {name for name, _ in small.named_parameters()}
    assert set(unused_by_segment(small)) == names - used


@pytest.mark.slow_on_cpu("fp16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("how", ["autocast", "base"])
def test_low_precision(small, small_double, how, dtype):
    size = (70, SIDE)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    arguments = prompts("boxes and points", 2, size)
    model = small
    if how == "base":
        model = copy.deepcopy(small)
        model.image_encoder.to(dtype)

    def narrow(function):
        with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
            return function(model, images, **arguments)

    ours, exact = narrow(segment), partial(stock, small_double, images, **arguments)
    assert ours.dtype == torch.float32
    within_budget(ours, partial(narrow, stock), exact, dtype)


def test_a_model_cast_as_a_whole_runs(small, small_double):
    model = copy.deepcopy(small).to(torch.bfloat16)
    images = torch.randint(0, 256, (2, 3, 70, SIDE), dtype=torch.uint8)
    arguments = prompts("boxes and points", 2, (70, SIDE))
    logits = segment(model, images, **arguments)
    assert logits.dtype == torch.float32
    exact = stock(small_double, images, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = stock(small, images, **arguments)
    # weights, pixel statistics and residuals are rounded too, so this is no budget: only sanity
    assert (logits - exact).norm() < 10 * (theirs - exact).norm()


def test_prompts_without_an_object_axis_are_of_one_object(small):
    images = torch.rand(2, 3, 40, 60) * 255
    boxes = random_boxes(2, 1, (40, 60))
    coords, labels = random_points(2, 1, 3, (40, 60))
    long = segment(small, images, boxes, (coords, labels))
    short = segment(small, images, boxes[:, 0], (coords[:, 0], labels[:, 0]))
    assert torch.equal(long, short)
    assert long.shape == (2, 1, 40, 60)


def test_images_of_any_memory_and_dtype_give_the_same_bits(small):
    images = torch.randint(0, 256, (2, 3, 40, 60), dtype=torch.uint8)
    expected = segment(small, images)
    before = images.clone()
    padded = torch.full((2, 40, 61, 4), 255, dtype=torch.uint8)
    padded[:, :, :60, :3] = images.permute(0, 2, 3, 1)
    view = padded[:, :, :60, :3].permute(0, 3, 1, 2)
    for same in (images, view, images.float(), images.double(), images.half()):
        assert torch.equal(segment(small, same), expected)
    assert torch.equal(images, before)


def test_every_run_gives_the_same_bits(small):
    images = torch.randint(0, 256, (2, 3, 60, SIDE), dtype=torch.uint8)
    arguments = prompts("boxes and points", 2, (60, SIDE))
    first, *others = (
        run(segment, small, images, arguments, torch.linspace(-1, 1, SIDE)) for _ in range(3)
    )
    torch.use_deterministic_algorithms(True)
    try:
        others.append(run(segment, small, images, arguments, torch.linspace(-1, 1, SIDE)))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_the_halves_make_the_whole(small):
    images = torch.randint(0, 256, (2, 3, 60, SIDE), dtype=torch.uint8)
    embeddings = encode(small, images)
    assert embeddings.shape == (2, 256, SIDE // 16, SIDE // 16)
    boxes = random_boxes(2, 2, (60, SIDE))
    assert torch.equal(decode(small, embeddings, (60, SIDE), boxes), segment(small, images, boxes))


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("count", [0, 2])
def test_empty_batches_and_no_objects(small, batch, count):
    images = torch.zeros(batch, 3, 30, 40)
    small.zero_grad()
    for arguments in (
        {"boxes": torch.zeros(batch, count, 4)},
        {"points": (torch.zeros(batch, count, 1, 2), torch.ones(batch, count, 1))},
    ):
        logits = segment(small, images, **arguments)
        assert logits.shape == (batch, count, 30, 40)
        logits.sum().backward()
    assert segment(small, images).shape == (batch, 1, 30, 40)


@pytest.mark.slow_on_cpu
def test_compiles_without_a_graph_break(small):
    images = torch.randint(0, 256, (1, 3, 30, SIDE), dtype=torch.uint8)
    arguments = prompts("boxes and points", 1, (30, SIDE))
    compiled = torch.compile(segment, fullgraph=True, backend="eager")
    assert torch.equal(compiled(small, images, **arguments), segment(small, images, **arguments))
    torch.compiler.reset()


IMAGE = torch.zeros(2, 3, 30, 40)
LABELS = torch.ones(2, 5)


@pytest.mark.parametrize(
    ("images", "arguments", "kind", "sentence"),
    [
        (IMAGE[0], {}, ValueError, r"images have shape \(3, 30, 40\), not \(batch, 3, "),
        (IMAGE[:, :1], {}, ValueError, r"images have shape \(2, 1, 30, 40\)"),
        (IMAGE.long(), {}, TypeError, "images are torch.int64, not uint8 or floating point"),
        (torch.zeros(1, 3, 97, 40), {}, ValueError, "97 x 40 pixels, but the model takes 1 to 96"),
        (torch.zeros(1, 3, 0, 40), {}, ValueError, "0 x 40 pixels, but the model takes 1 to 96"),
        (IMAGE.to("meta"), {}, ValueError, "images are on meta, the model on cpu"),
        (IMAGE, {"boxes": torch.zeros(3, 4)}, ValueError, r"boxes have shape \(3, 4\), not \(2, 4"),
        (IMAGE, {"boxes": torch.zeros(2, 5)}, ValueError, r"boxes have shape \(2, 5\)"),
        (IMAGE, {"boxes": torch.zeros(2, 1, 4).bool()}, TypeError, "boxes are torch.bool"),
        (IMAGE, {"boxes": torch.zeros(2, 4, device="meta")}, ValueError, "boxes are on meta"),
        (IMAGE, {"points": torch.zeros(2, 5, 2)}, TypeError, "points are not a pair"),
        (
            IMAGE,
            {"points": (torch.zeros(2, 5, 3), LABELS)},
            ValueError,
            r"point coordinates have shape \(2, 5, 3\), not \(2, P, 2\) or \(2, N, P, 2\)",
        ),
        (
            IMAGE,
            {"points": (torch.zeros(2, 4, 2), LABELS)},
            ValueError,
            r"point labels have shape \(2, 5\), but the coordinates \(2, 4, 2\)",
        ),
        (
            IMAGE,
            {"points": (torch.zeros(2, 5, 2), LABELS * 3)},
            ValueError,
            "point label 3.0 is not 1, 0 or -1",
        ),
        (
            IMAGE,
            {"boxes": torch.zeros(2, 3, 4), "points": (torch.zeros(2, 5, 2), LABELS)},
            ValueError,
            "boxes are of 3 objects per image, points of 1",
        ),
    ],
)
def test_bad_inputs(small, images, arguments, kind, sentence):
    with pytest.raises(kind, match=sentence):
        segment(small, images, **arguments)


def test_decode_refuses_foreign_embeddings(small):
    with pytest.raises(ValueError, match=r"\(1, 256, 5, 6\), not \(batch, 256, 6, 6\)"):
        decode(small, torch.zeros(1, 256, 5, 6), (30, 40))
    with pytest.raises(ValueError, match="97 x 40 pixels"):
        decode(small, torch.zeros(1, 256, 6, 6), (97, 40))
