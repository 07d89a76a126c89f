# SPDX-License-Identifier: Apache-2.0
"""segment on Hugging Face's Sam3TrackerModel against its own forward in training."""

import copy
from functools import partial

import pytest
import torch
from budgets import all_within_budget, within_budget
from torch.nn import functional as F

pytest.importorskip("transformers")

from sam3_models import CHANNELS, FOUR, SIDE, THREE, tracker

import samfast
from samfast.models import decode, encode, image_size, segment, unused_by_segment
from samfast.models.sam3 import TRAINED_DECODER

SLOW = pytest.mark.slow
SIZE = (50, SIDE)
PROMPTS = ("none", "boxes", "points", "both")


def images(batch=2):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (batch, 3, *SIZE), dtype=torch.uint8, generator=generator)


def prompts(kind, batch=2, count=3):
    """segment's arguments; one of the points is padding."""
    generator = torch.Generator().manual_seed(6)
    scale = torch.tensor(SIZE[::-1])

    def coordinates(*shape):
        return (torch.rand(*shape, 2, generator=generator) * scale * 8).floor() / 8

    boxes = coordinates(batch, count, 2).sort(dim=2).values.flatten(2)
    labels = torch.randint(0, 2, (batch, count, 2), generator=generator)
    labels[0, 0, 1] = -1
    given = {"boxes": boxes, "points": (coordinates(batch, count, 2), labels)}
    names = {"none": (), "boxes": ("boxes",), "points": ("points",), "both": ("boxes", "points")}
    return {name: given[name] for name in names[kind]}


def own_forward(model, images, boxes=None, points=None):
    """Logits by the model's own forward in training mode, enlarged as its processor does."""
    like = model.no_memory_embedding
    height, width = images.shape[2:]
    pixels = F.pad((images.to(like) / 127.5) - 1, (0, SIDE - width, 0, SIDE - height))
    coords, labels = points or (None, None)
    model.train()
    masks = model(
        pixel_values=pixels,
        input_boxes=boxes,
        input_points=coords,
        input_labels=labels,
        multimask_output=False,
    ).pred_masks[:, :, 0]
    model.eval()
    masks = F.interpolate(masks, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return masks[..., :height, :width]


def run(function, model, images, **arguments):
    """Logits, and the gradients of parameters that are not zero."""
    model.zero_grad()
    logits = function(model, images, **arguments)
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=torch.float64)
    (logits * weights.to(logits)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **{n: g for n, g in grads.items() if g.any()}}


def doubled(model):
    return copy.deepcopy(model).double()


CASES = [(given, f, chunk) for given in PROMPTS for f in (THREE, FOUR) for chunk in (None, 2)]
QUICK = [("both", THREE, None), ("boxes", FOUR, 2)]


@pytest.mark.parametrize(
    ("given", "factors", "chunk"),
    [*QUICK, *(pytest.param(*case, marks=SLOW) for case in CASES if case not in QUICK)],
)
def test_equals_the_models_own_forward(given, factors, chunk):
    """With every gradient; in chunks, one begins in the middle of an image."""
    model, arguments = tracker(factors, seed=2), prompts(given)
    stock = partial(run, own_forward, model, images(), **arguments)
    exact = partial(run, own_forward, doubled(model), images(), **arguments)
    ours = run(partial(segment, decoder_chunk=chunk), model, images(), **arguments)
    all_within_budget(ours, stock, exact, torch.float32)
    assert ("no_memory_embedding" in ours) == (factors == THREE)


@pytest.mark.parametrize("given", [pytest.param("none", marks=SLOW), "points"])
def test_fused(given):
    """The encoder fused, forwards and backwards."""
    model, arguments = tracker(), prompts(given)
    stock = partial(run, own_forward, model, images(), **arguments)
    exact = partial(run, own_forward, doubled(model), images(), **arguments)
    fused = samfast.fuse(copy.deepcopy(model))
    assert set(samfast.report(fused).blocks.values()) == {"fused"}
    all_within_budget(run(segment, fused, images(), **arguments), stock, exact, torch.float32)


@pytest.mark.parametrize("factors", [THREE, FOUR])
def test_unused_parameters_get_no_gradient(factors):
    model = tracker(factors)
    used = {
        n for given in ("none", "both") for n in run(segment, model, images(), **prompts(given))
    }
    names = {name for name, _ in model.named_parameters()}
    assert set(unused_by_segment(model)) == names - used
    decoder = {name for name in used if name.startswith("mask_decoder.")}
    assert decoder == {n for n in names if n.startswith(tuple(f"{p}." for p in TRAINED_DECODER))}


@pytest.mark.parametrize("how", ["autocast", "base"])
def test_low_precision(how):
    model, arguments = tracker(), prompts("both")
    exact = partial(own_forward, doubled(model), images(), **arguments)
    if how == "base":
        model.vision_encoder.bfloat16()
        assert encode(model, images()).dtype == torch.float32  # of the decoder's two convolutions

    def stock():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return own_forward(tracker(), images(), **arguments)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        ours = segment(model, images(), **arguments)
    assert ours.dtype == torch.float32
    within_budget(ours, stock, exact, torch.bfloat16)


def test_the_halves_make_the_whole():
    model, arguments = tracker(), prompts("boxes")
    with torch.no_grad():
        whole = segment(model, images(), **arguments)
        found = encode(model, images())
        assert found.shape == (2, CHANNELS + 16 * (CHANNELS // 8) + 4 * (CHANNELS // 4), 4, 4)
        assert torch.equal(decode(model, found, SIZE, **arguments), whole)
        some = segment(model, images(), [arguments["boxes"][0], arguments["boxes"][1, :1]])
        assert encode(model, images()[:0]).shape == (0, *found.shape[1:])
    assert [len(masks) for masks in some] == [3, 1] and torch.equal(some[0], whole[0])
    assert image_size(model) == SIDE and whole.shape == (2, 3, *SIZE)
    with pytest.raises(ValueError, match=r"embeddings have shape .*, not \(batch, 128, 4, 4\)"):
        decode(model, found[:, :CHANNELS], SIZE)


def test_one_mode_of_two():
    """Another mask than the model's own choice in eval mode; the same in both of segment's."""
    model, arguments = tracker(), prompts("points")
    with torch.no_grad():
        ours = segment(model.eval(), images(), **arguments)
        assert torch.equal(segment(model.train(), images(), **arguments), ours)


def test_what_does_not_fit_is_refused():
    from transformers import Sam3Model

    model = tracker()
    model.prompt_encoder.input_image_size = 1008
    with pytest.raises(ValueError, match="vision encoder has 56 and its prompt encoder 1008"):
        segment(model, images())
    other = object.__new__(Sam3Model)
    torch.nn.Module.__init__(other)
    other.vision_encoder = tracker().vision_encoder
    with pytest.raises(TypeError, match=r"got Sam3Model; of .* SamHQModel or Sam3TrackerModel$"):
        segment(other, images())
