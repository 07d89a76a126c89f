# SPDX-License-Identifier: Apache-2.0
"""Objects with prompts of their own against segment_anything, one object after the other."""

import pytest
import torch
from budgets import all_within_budget
from stock_loop import SIDE

from samfast.models.objects import of_counted_objects
from samfast.models.prompted import FirstPrompts, decode_each
from samfast.models.segment import upscale

COUNTS = (2, 0, 1)
SIZE = (SIDE, SIDE - 12)
IS_BOX = [True, False, False]
GRADIENTS = (
    "prompt_encoder.mask_downscaling.0.weight",
    "prompt_encoder.point_embeddings.0.weight",
    "prompt_encoder.point_embeddings.1.weight",
    "prompt_encoder.point_embeddings.3.weight",
    "prompt_encoder.not_a_point_embed.weight",
    "prompt_encoder.no_mask_embed.weight",
    "mask_decoder.mask_tokens.weight",
)


def inputs(rounds, dtype=torch.float32):
    """Embeddings, first prompts, and clicks of each further round; eighths of pixels are exact."""
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape):
        return (torch.rand(*shape, generator=generator) * SIZE[1] * 8).floor() / 8

    embeddings = torch.randn(len(COUNTS), 256, SIDE // 16, SIDE // 16, generator=generator)
    corners = drawn(3, 2, 2).sort(dim=1).values.flatten(1)
    points = torch.cat([drawn(3, 2), torch.tensor([[1.0, 0], [1, 0], [0, 0]])], 1)
    is_box = torch.tensor(IS_BOX)
    first = FirstPrompts(torch.where(is_box[:, None], corners, points), is_box)
    labels = torch.tensor([[1, 0, -1], [0, -1, 1]])[: rounds - 1].float()
    clicks = [torch.cat([drawn(3, 2), label[:, None]], dim=1) for label in labels]
    return embeddings.to(dtype).requires_grad_(), first, clicks


def ours(sam, given, rounds, chunk=None):
    embeddings, first, clicks = given
    low, found = None, []
    for number in range(rounds):
        earlier = torch.stack(clicks[:number], dim=1) if number else None
        low = decode_each(sam, embeddings, COUNTS, first, earlier, low, chunk=chunk)
        found.append(upscale(low, SIZE, SIDE))
    return torch.stack(found)


def theirs(sam, given, rounds):
    """Each object by the prompt encoder and the mask decoder, with its earlier mask."""
    embeddings, first, clicks = given
    images_of = [i for i, count in enumerate(COUNTS) for _ in range(count)]
    found = [[] for _ in range(rounds)]
    for m, (first_one, is_box) in enumerate(zip(first.given, IS_BOX, strict=True)):
        embedding, low = embeddings[images_of[m], None], None
        for number in range(rounds):
            points = [] if is_box else [first_one[:3]]
            points += [own[m] for own in clicks[:number]]
            taken = torch.stack(points)[None] if points else None
            sparse, dense = sam.prompt_encoder(
                points=None if taken is None else (taken[..., :2], taken[..., 2]),
                boxes=first_one[None] if is_box else None,
                masks=low,
            )
            low, _ = sam.mask_decoder(
                image_embeddings=embedding,
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            found[number].append(sam.postprocess_masks(low, SIZE, SIZE)[0, 0])
    return torch.stack([torch.stack(own) for own in found])


def results(function, sam, rounds, *arguments):
    """Logits and the gradients of embeddings and of those GRADIENTS that there are."""
    sam.zero_grad()
    given = inputs(rounds, sam.pixel_mean.dtype)
    logits = function(sam, given, rounds, *arguments)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights.sin()).sum().backward()
    found = {name: sam.get_parameter(name).grad for name in GRADIENTS}
    found = {name: gradient for name, gradient in found.items() if gradient is not None}
    return {"logits": logits.detach(), "embeddings": given[0].grad, **found}


@pytest.mark.parametrize(
    ("rounds", "chunk"),
    [(2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, None), (3, 1)))],
)
def test_equals_segment_anything_in_float32(small, small_double, rounds, chunk):
    found = results(ours, small, rounds, chunk)
    assert ("prompt_encoder.mask_downscaling.0.weight" in found) == (rounds > 1)

    def stock():
        return results(theirs, small, rounds)

    def exact():
        return results(theirs, small_double, rounds)

    all_within_budget(found, stock, exact, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 2])
def test_rounds_and_chunks_are_those_of_single_objects(small_double, chunk):
    """In float64, with gradients that go through the earlier masks."""
    found = results(ours, small_double, 3, chunk)

    def stock():
        return results(theirs, small_double, 3)

    all_within_budget(found, stock, stock, torch.float64)


def test_no_object_gives_no_mask_and_gradients_of_zero(small):
    embeddings = inputs(1)[0]
    first = FirstPrompts(torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool))
    masks = decode_each(small, embeddings, (0, 0, 0), first)
    assert masks.shape == (0, SIDE // 4, SIDE // 4)
    again = decode_each(small, embeddings, (0, 0, 0), first, torch.zeros(0, 1, 3), masks, chunk=1)
    small.zero_grad()
    again.sum().backward()
    assert not embeddings.grad.any() and not small.mask_decoder.iou_token.weight.grad.any()


def test_rows_of_each_image():
    rows = of_counted_objects(torch.arange(6).view(3, 2), (1, 0, 2))
    assert rows.tolist() == [[0, 1], [4, 5], [4, 5]]
