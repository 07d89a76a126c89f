# SPDX-License-Identifier: Apache-2.0
"""SAM's geometry, padding, flips and their reproducibility."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from samfast.integrations import segment_anything
from samfast.models import build_sam
from samfast.training.data import (
    Collate,
    EpochSampler,
    PairDataset,
    model_size,
    padded_images,
    resize_image,
    resize_mask,
    valid_region,
)
from samfast.training.folders import load_split


@pytest.mark.parametrize("height,width", [(303, 384), (384, 303), (64, 64), (1000, 7), (33, 700)])
@pytest.mark.parametrize("side", [64, 1024])
def test_resizing_is_that_of_segment_anything(height, width, side):
    package = segment_anything.load()
    transform = package.predictor.ResizeLongestSide(side)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if min(model_size(height, width, side)) > 1:
        assert np.array_equal(resize_image(image, side), transform.apply_image(image))
    assert resize_mask(image[..., 0] > 99, side).shape == model_size(height, width, side)


def test_a_sliver_keeps_one_pixel():
    assert model_size(1, 10_000, 64) == (1, 64)


def test_batch_is_padded_and_only_real_pixels_are_valid(shared_data):
    pairs = load_split(shared_data).train
    samples = [PairDataset(pairs, 64)[i] for i in (0, 3)]
    batch = Collate(64, truths=True)(samples)
    assert batch.images.shape == (2, 3, 64, 64) and batch.images.dtype == torch.uint8
    valid = valid_region(batch.sizes, 64)
    for i, sample in enumerate(samples):
        height, width = sample.mask.shape
        assert batch.sizes[i].tolist() == [height, width]
        inside = batch.images[i, :, :height, :width].numpy().transpose(1, 2, 0)
        assert np.array_equal(inside, sample.image)
        assert np.array_equal(batch.masks[i, :height, :width].numpy(), sample.mask)
        assert valid[i, :height, :width].all() and valid[i].sum() == height * width
        assert not batch.masks[i][~valid[i]].any() and not batch.images[i][:, ~valid[i]].any()
        assert np.array_equal(batch.truths[i].numpy(), sample.truth)
    assert any(v.sum() < 64 * 64 for v in valid)


def test_padding_is_zero_after_sams_normalisation(shared_data):
    sam = build_sam("vit_tiny", image_size=64, seed=0)
    batch = Collate(64, truths=False)([PairDataset(load_split(shared_data).train, 64)[0]])
    valid = valid_region(batch.sizes, 64)
    images = padded_images(batch.images, valid, sam.pixel_mean)
    height, width = batch.sizes[0].tolist()
    stock = sam.preprocess(batch.images[0, :, :height, :width].float())  # normalises, then pads
    assert torch.equal((images - sam.pixel_mean) / sam.pixel_std, stock[None])
    assert batch.truths == []


def test_flips_are_a_function_of_seed_pass_and_index(shared_data):
    pairs = load_split(shared_data).train  # 64 pixels wide, so nothing is resized here
    plain = PairDataset(pairs, 64)[0]
    ways = {
        np.ascontiguousarray(np.flip(plain.image, axes)).tobytes(): np.flip(plain.mask, axes)
        for axes in ((), (0,), (1,), (0, 1))
    }
    data = PairDataset(pairs, 64, flips=True, seed=5)
    seen = set()
    for number in range(24):
        sample, again = data[0, number], PairDataset(pairs, 64, flips=True, seed=5)[0, number]
        assert np.array_equal(sample.image, again.image)
        key = sample.image.tobytes()
        assert np.array_equal(ways[key], sample.mask)
        seen.add(key)
    assert seen == set(ways)


def test_order_and_flips_do_not_depend_on_workers(shared_data):
    def epochs(workers):
        data = PairDataset(load_split(shared_data).train, 64, flips=True, seed=1)
        sampler = EpochSampler(len(data), seed=1, repeats=2)
        loader = DataLoader(
            data,
            2,
            sampler=sampler,
            collate_fn=Collate(64, truths=False),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        for epoch in range(3):
            sampler.set_epoch(epoch)
            yield torch.cat([batch.images for batch in loader])

    keys = EpochSampler(5, seed=1, repeats=2)
    keys.set_epoch(3)
    assert len(keys) == 10 and sorted(keys) == [(i, n) for i in range(5) for n in (6, 7)]
    alone, together = list(epochs(0)), list(epochs(2))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], alone[1])
