# SPDX-License-Identifier: Apache-2.0
"""segment_anything's own loop over images, prompts for it, and results to compare."""

import torch

SIDE = 96  # of the small models' images: a grid of 6, whose windows of 7 are padded


def stock(sam, images, boxes=None, points=None):
    """Logits by segment_anything's modules, one image after the other."""
    results = []
    for i, image in enumerate(images):
        pixels = sam.preprocess(image)[None].to(sam.image_encoder.patch_embed.proj.weight.dtype)
        embedding = sam.image_encoder(pixels).to(sam.mask_decoder.mask_tokens.weight.dtype)
        sparse, dense = sam.prompt_encoder(
            points=None if points is None else (points[0][i], points[1][i]),
            boxes=None if boxes is None else boxes[i],
            masks=None,
        )
        masks, _ = sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        size = image.shape[-2:]
        results.append(sam.postprocess_masks(masks, size, size)[:, 0])
    return torch.stack(results)


def random_coordinates(shape, size):
    """x, y [*shape, 2] in pixels and eighths of them, so that half a pixel more is exact."""
    return (torch.rand(*shape, 2) * torch.tensor(size[::-1]) * 8).floor() / 8


def random_boxes(batch, count, size):
    return random_coordinates((batch, count, 2), size).sort(dim=2).values.flatten(2)


def random_points(batch, count, number, size):
    coords = random_coordinates((batch, count, number), size)
    return coords, torch.randint(0, 2, (batch, count, number))


def prompts(kind, batch, size):
    """Prompts with N = 1 or 3 objects; with "points, ragged" some points are padding."""
    if kind == "none":
        return {}
    if kind == "one box":
        return {"boxes": random_boxes(batch, 1, size)}
    if kind == "three boxes":
        return {"boxes": random_boxes(batch, 3, size)}
    if kind == "one point":
        return {"points": random_points(batch, 1, 1, size)}
    if kind == "points, ragged":
        coords, labels = random_points(batch, 3, 4, size)
        labels[:, 1, 2:] = -1
        return {"points": (coords, labels)}
    assert kind == "boxes and points"
    return {"boxes": random_boxes(batch, 3, size), "points": random_points(batch, 3, 2, size)}


KINDS = ("none", "one box", "three boxes", "one point", "points, ragged", "boxes and points")


def run(function, sam, images, arguments, weights):
    """Logits and the gradients of every parameter that has one."""
    sam.zero_grad()
    logits = function(sam, images, **arguments)
    (logits * weights.to(logits.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in sam.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}
