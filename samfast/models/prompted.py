# SPDX-License-Identifier: Apache-2.0
"""Decode masks of single objects from boxes, points and earlier masks, any number per image.

``decode`` takes one kind of prompt and equally many objects per image. Here each object has its own
first prompt, a box or a point. Clicks that correct it and the mask of the round before follow. The
results equal segment_anything's prompt encoder and mask decoder, one object at a time.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samfast.adapters.foreign import Foreign
from samfast.models.objects import of_counted_objects
from samfast.models.segment import (
    encode_grid,
    encode_pixels,
    grid_layer,
    masks_of_sources,
    may_draw,
)


class FirstPrompts(NamedTuple):
    """The first prompt of each of M objects.

    given: [M, 4], a box x0, y0, x1, y1 or a point x, y, label, 0, in pixels of the model's input
    is_box: bool [M]
    """

    given: Tensor
    is_box: Tensor


def decode_each(
    sam: nn.Module,
    embeddings: Tensor,
    counts: Sequence[int],
    first: FirstPrompts,
    clicks: Tensor | None = None,
    masks: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Decode logits [M, 4n, 4n] of M objects, from the decoder's first mask token.

    sam: segment_anything's Sam   embeddings: [B, 256, n, n] as ``encode`` gives them
    counts: number of objects per image; objects of an image are in sequence
    clicks: [M, P, 3], corrections of the first prompt: x, y and label 1, 0 or -1 (no point)
    masks: logits [M, 4n, 4n] of the round before, which receive gradients; None: no mask
    chunk: number of objects that the decoder takes at a time, see ``segment``; None: all
    """
    model: Foreign = sam
    tokens = _tokens(model.prompt_encoder, first, clicks)
    total = len(tokens)
    size = total if chunk is None else chunk
    positions = encode_grid(grid_layer(model), (embeddings.shape[2], embeddings.shape[3]))
    run = partial(_some, model, positions)
    if size < total and torch.is_grad_enabled():
        draws = any(may_draw(module) for module in model.mask_decoder.modules())
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=draws)
    places = [*range(0, total, max(1, size)), total]
    found = []
    for begin, end in pairwise(places):
        one = None if masks is None else masks[begin:end]
        found.append(run(embeddings, _within(counts, begin, end), tokens[begin:end], one))
    if not found:
        found.append(run(embeddings, [0] * len(counts), tokens, masks))
    return torch.cat(found)


def _within(counts: Sequence[int], begin: int, end: int) -> list[int]:
    """Count each image's objects in the range from `begin` to before `end`."""
    found, before = [], 0
    for count in counts:
        found.append(max(0, min(end, before + count) - max(begin, before)))
        before += count
    return found


def _some(
    sam: Foreign,
    positions: Tensor,
    embeddings: Tensor,
    counts: Sequence[int],
    tokens: Tensor,
    masks: Tensor | None,
) -> Tensor:
    """Run ``decode_each`` on these objects of each image; tokens: [M, T, 256]"""
    decoder, prompts = sam.mask_decoder, sam.prompt_encoder
    dtype = decoder.mask_tokens.weight.dtype
    embeddings = embeddings.to(dtype)
    if masks is None:
        nothing = prompts.no_mask_embed.weight.to(dtype)[..., None, None]
        source = of_counted_objects(embeddings + nothing, counts)
    else:
        layers = prompts.mask_downscaling
        dense = layers(masks[:, None].to(layers[0].weight.dtype))
        source = of_counted_objects(embeddings, counts) + dense.to(dtype)
    return masks_of_sources(decoder, source, positions, tokens)


def _tokens(encoder: Foreign, first: FirstPrompts, clicks: Tensor | None) -> Tensor:
    """Encode prompt tokens [M, P + 2, 256], in segment_anything's order.

    For a box: the clicks, then its corners. For a point: the point, the clicks, a padding point.
    """
    background, foreground, left, right = (e.weight for e in encoder.point_embeddings)  # [1, 256]
    nothing = encoder.not_a_point_embed.weight
    pairs = encode_pixels(encoder, first.given.unflatten(1, (2, 2)))  # [M, 2, 256]
    corners = pairs + torch.cat([left, right])
    kind = torch.where(first.given[:, 2:3] == 1, foreground, background)
    point = (pairs[:, 0] + kind)[:, None]
    own = corners[:, :0]
    if clicks is not None:
        label = clicks[..., 2:]
        own = encode_pixels(encoder, clicks[..., :2])
        own = own + torch.where(label == 1, foreground, background)
        own = torch.where(label == -1, nothing, own)
    of_box = torch.cat([own, corners], dim=1)
    of_point = torch.cat([point, own, nothing.expand(len(point), 1, -1)], dim=1)
    return torch.where(first.is_box[:, None, None], of_box, of_point)
