# SPDX-License-Identifier: Apache-2.0
"""Objects and their prompts in batches, and the clicks that correct a mask."""

import numpy as np
import pytest
import torch
from objects_folder import NUMBERS, discs, fill_with_objects
from PIL import Image
from torch.utils.data import DataLoader

from samfast.training.boxes import foreground_box, resized_box
from samfast.training.corrective_clicks import deepest_click, point_in, random_clicks
from samfast.training.data import EpochSampler, flipped_axes, resize_mask
from samfast.training.folders import find_pairs
from samfast.training.objects import Objects
from samfast.training.points import clicked_point
from samfast.training.prompted_data import (
    ObjectCollate,
    ObjectDataset,
    ResizedObjects,
    kept_lines,
    read_objects,
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = fill_with_objects(tmp_path_factory.mktemp("data") / "d", 4, empty=(2,))
    rng = np.random.default_rng(0)
    many = rng.integers(0, 5, (70, 90)).astype(np.uint8)  # four objects in pieces
    Image.fromarray(many).save(folder / "masks" / "many.png")
    Image.fromarray(np.stack([many * 50] * 3, 2)).save(folder / "images" / "many.png")
    return find_pairs(folder)


def dataset(pairs, side=48, **options):
    given = {"prompt": "mixed", "objects": 3, "rounds": 2, "flips": True, "seed": 5, **options}
    return ObjectDataset(pairs, side, **given)


def test_objects_of_a_label_image():
    labels = np.array([[0, 9, 9], [4, 0, 9], [4, 4, 0]], np.uint16)
    objects = Objects.from_labels(labels)
    assert (len(objects), objects.size, objects.areas.tolist()) == (2, (3, 3), [3, 3])
    assert objects.boxes.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert np.array_equal(objects.mask(1), labels == 9)
    assert objects.labels().tolist() == [[0, 2, 2], [1, 0, 2], [1, 1, 0]]


def test_a_mask_of_bools_is_one_object(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[True, False], [True, False]]))
    assert read_objects(tmp_path / "a.npy").areas.tolist() == [2]


@pytest.mark.parametrize("size", [(70, 90), (33, 700), (64, 64), (1, 7), (301, 203)])
@pytest.mark.parametrize("side", [8, 48, 64, 1000])
def test_resized_masks_are_those_of_the_whole_image(size, side):
    labels = np.random.default_rng(1).integers(0, 40, size)
    objects = Objects.from_labels(labels)
    resized = ResizedObjects(objects, side)
    small = [resize_mask(objects.mask(i), side) for i in range(len(objects))]
    assert all(np.array_equal(resized.mask(i), own) for i, own in enumerate(small))
    assert resized.there().tolist() == [own.any() for own in small]
    assert len(kept_lines(size[0], 5)) == 5


def test_samples_are_flipped_with_their_prompts(pairs):
    """Each mask is one object's, flipped as the image is, and the prompt lies on it."""
    data, still = dataset(pairs, box_jitter=0.0), dataset(pairs, flips=False)
    seen = set()
    for number in range(12):
        for index, pair in enumerate(pairs):
            sample, objects = data[index, number], read_objects(pair.mask)
            axes = flipped_axes(5, number, index)
            seen.add((tuple(axes), *sample.is_box.tolist()))
            image = np.flip(still[index, number].image, axes)
            assert np.array_equal(sample.image, image) and sample.name is None
            assert still[index].name == str(pair.image)
            known = [
                np.flip(ResizedObjects(objects, 48).mask(i), axes) for i in range(len(objects))
            ]
            assert len(sample.masks) == min(3, len(objects))
            found = [
                next(i for i, own in enumerate(known) if np.array_equal(own, mask))
                for mask in sample.masks
            ]
            assert len(set(found)) == len(found)
            for i, given, is_box in zip(found, sample.given, sample.is_box, strict=True):
                mask = np.flip(objects.mask(i), axes)
                if is_box:
                    own = resized_box(foreground_box(mask), mask.shape, sample.masks.shape[1:])
                    assert np.array_equal(given, own)
                else:
                    x, y = np.round(given[:2] * mask.shape[::-1] / sample.masks.shape[:0:-1])
                    assert mask[int(y), int(x)] and given[2:].tolist() == [1, 0]
    assert len(seen) > 8


def test_a_sample_is_a_function_of_seed_pass_and_index(pairs):
    data, again, other = dataset(pairs), dataset(pairs), dataset(pairs, seed=6)
    index = next(i for i, pair in enumerate(pairs) if pair.stem == "many")
    one, same, another, later = data[index, 3], again[index, 3], other[index, 3], data[index, 4]
    for name in ("image", "masks", "given", "is_box", "draws"):
        assert np.array_equal(getattr(one, name), getattr(same, name)), name
    for different in (another, later):
        assert not np.array_equal(one.draws, different.draws)
        assert not np.array_equal(one.given, different.given)
    chosen = {data[index, n].masks.tobytes() for n in range(6)}
    assert len(chosen) >= 5  # other objects, or in another order
    jittered = dataset(pairs, prompt="box", box_jitter=3.0)[index, 3]
    exact = dataset(pairs, prompt="box")[index, 3]
    difference = np.abs(jittered.given - exact.given)
    assert jittered.is_box.all() and 0.1 < difference.max() <= 3
    assert dataset(pairs, prompt="point")[index].is_box.sum() == 0
    assert dataset(pairs, rounds=1)[index].draws.shape == (3, 0)


def test_batches_do_not_depend_on_workers_and_images_may_have_no_object(pairs):
    def epoch(workers):
        data = dataset(pairs)
        sampler = EpochSampler(len(data), 1, repeats=2)
        collate = ObjectCollate(48)
        return list(DataLoader(data, 2, sampler=sampler, collate_fn=collate, num_workers=workers))

    for one, other in zip(epoch(0), epoch(2), strict=True):
        assert one.counts == other.counts and len(one.masks) == sum(one.counts)
        for name in ("images", "sizes", "masks", "draws"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert torch.equal(one.first.given, other.first.given)
    index = next(i for i, pair in enumerate(pairs) if pair.stem == "p2")
    empty = ObjectCollate(48)([dataset(pairs)[index, 0]])
    assert empty.counts == (0,) and empty.masks.shape == (0, 48, 48)
    assert empty.first.given.shape == (0, 4) and empty.draws.shape == (0, 1)


def test_points_within_the_box_are_those_of_the_whole_mask():
    labels = discs(3)[1]
    for number in NUMBERS:
        mask = labels == number
        assert np.array_equal(point_in(mask), clicked_point(mask))
        seeded = [np.random.default_rng(4) for _ in range(2)]
        drawn = (
            function(mask, rng)
            for function, rng in zip((point_in, clicked_point), seeded, strict=True)
        )
        x, y = next(drawn)[:2].astype(int)
        assert mask[y, x] and np.array_equal(next(drawn)[:2], [x, y])
    assert point_in(np.zeros((3, 5), bool)).tolist() == [2, 1, 0]


def test_random_clicks_count_the_wrong_pixels_line_by_line():
    rng = np.random.default_rng(0)
    predicted, truth, valid = (torch.from_numpy(rng.random((6, 7, 9)) < p) for p in (0.5, 0.5, 0.8))
    truth[4] = predicted[4]  # nothing is wrong
    valid[5] = False
    draws = torch.tensor([0.0, 0.37, 0.999999999, 0.5, 0.2, 0.9], dtype=torch.float64)
    found = random_clicks(predicted, truth, valid, draws)
    assert found.dtype == torch.float32 and found[4:, 2].tolist() == [-1, -1]
    for m in range(4):
        wrong = ((predicted[m] != truth[m]) & valid[m]).nonzero().tolist()
        y, x = wrong[int(draws[m] * len(wrong))]
        assert found[m].tolist() == [x, y, float(truth[m, y, x])]


def test_the_deepest_click_is_in_the_larger_error():
    truth, predicted = np.zeros((2, 9, 12), bool)
    truth[0:5, 0:5] = True
    assert deepest_click(predicted, truth).tolist() == [2, 2, 1]  # all is missed
    predicted[:] = truth
    assert deepest_click(predicted, truth).tolist() == [0, 0, -1]  # nothing is wrong
    predicted[4:7, 7:10] = True
    assert deepest_click(predicted, truth).tolist() == [8, 5, 0]  # too much
    predicted[0:3, 0:3] = False
    predicted[8] = False
    assert deepest_click(predicted, truth)[2] == 1  # equally large: what is missed
