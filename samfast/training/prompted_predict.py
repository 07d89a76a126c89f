# SPDX-License-Identifier: Apache-2.0
"""Objects in new photographs by prompts, as label images."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from samfast.training.boxes import resized_box
from samfast.training.data import model_size, resize_image
from samfast.training.evaluate import full_size_mask, scoring
from samfast.training.image_options import ImageOptions
from samfast.training.images import read_image
from samfast.training.object_prompts import ObjectPrompt, Prompts
from samfast.training.points import resized_point
from samfast.training.prompted_data import ObjectCollate, ObjectSample, unprompted
from samfast.training.prompted_scores import AT_ONCE, LabelMap, first_prompts
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.stacks import Source


class _Photographs(Dataset):
    """Images at the model's size, without objects."""

    def __init__(self, paths: Sequence[Source], side: int, options: ImageOptions):
        self.paths, self.side, self.options = paths, side, options

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ObjectSample:
        image = read_image(self.paths[index], self.options)
        return unprompted(resize_image(image, self.side), None, None)


def predicted_objects(
    model: PromptedSegmenter,
    prompts: Prompts,
    shapes: Mapping[Source, tuple[int, int]],
    side: int,
    options: ImageOptions,
    batch_size: int,
) -> Iterator[np.ndarray]:
    """int32 (H, W) of each image: object i of its prompts is i + 1, the smaller on top.

    shapes: (height, width) of each image
    """
    device = next(model.parameters()).device
    paths = list(prompts)
    loader = DataLoader(
        _Photographs(paths, side, options), batch_size=batch_size, collate_fn=ObjectCollate(side)
    )
    images = iter(paths)
    with scoring(model):
        for batch in loader:
            embeddings = model.embeddings(batch.images.to(device), batch.sizes.to(device))
            for embedding in embeddings.split(1):
                path = next(images)
                found = LabelMap(shapes[path])
                masks = object_masks(model, embedding, prompts[path], shapes[path], side)
                for number, mask in enumerate(masks, start=1):
                    found.add(mask, number)
                yield found.labels


def object_masks(
    model: PromptedSegmenter,
    embedding: torch.Tensor,
    prompts: Sequence[ObjectPrompt],
    shape: tuple[int, int],
    side: int,
) -> Iterator[np.ndarray]:
    """bool (H, W) of each prompt. embedding: (1, 256, n, n)   shape: (H, W) of the image"""
    size = model_size(*shape, side)
    step = model.decoder_chunk or AT_ONCE
    for begin in range(0, len(prompts), step):
        some = prompts[begin : begin + step]
        given, clicks = zip(*(_resized(prompt, shape, size) for prompt in some), strict=True)
        first = first_prompts(list(given), [p.box is not None for p in some], embedding.device)
        more = _padded(clicks).to(embedding.device)
        (one,) = model.rounds(embedding, [len(some)], first, given=more)
        for logits in one.logits:
            yield full_size_mask(logits, *size, shape).cpu().numpy()


def _resized(
    prompt: ObjectPrompt, before: Sequence[int], after: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """First prompt (4,) and clicks (P, 3), in pixels of the model's square."""
    points = np.array([resized_point(point, before, after) for point in prompt.points])
    points = points.reshape(-1, 3)
    if prompt.box is not None:
        return resized_box(prompt.box, before, after), points
    return np.append(points[0], 0.0), points[1:]


def _padded(clicks: Sequence[np.ndarray]) -> torch.Tensor:
    """float32 (M, P, 3), with no points, label -1, behind those of an object that has fewer."""
    most = max(map(len, clicks))
    found = np.zeros((len(clicks), most, 3), np.float32)
    found[..., 2] = -1
    for row, own in zip(found, clicks, strict=True):
        row[: len(own)] = own
    return torch.from_numpy(found)
