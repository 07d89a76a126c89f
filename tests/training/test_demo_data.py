# SPDX-License-Identifier: Apache-2.0
"""The demonstration's photographs: whole coins, and no coin on both sides of the split."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from samfast.training import demo_run
from samfast.training.demo_data import TRAIN_COLUMNS, VAL_COLUMNS, coins_and_truth, write_coins
from samfast.training.folders import load_split


def test_truth_is_twenty_four_whole_coins():
    photograph, truth = coins_and_truth()
    assert photograph.shape == truth.shape == (303, 384)
    labels, count = ndimage.label(truth)
    assert count == 24
    assert np.array_equal(ndimage.binary_fill_holes(truth), truth)
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        area = (labels[box] == number).sum()
        height, width = labels[box].shape
        assert 0.7 < area / (height * width) < 0.85  # an ellipse fills pi / 4 of its box
        assert 0.8 < height / width < 1.25


def test_no_coin_lies_in_both_parts():
    labels, _ = ndimage.label(coins_and_truth()[1])
    train = set(np.unique(labels[:, slice(*TRAIN_COLUMNS)])) - {0}
    val = set(np.unique(labels[:, slice(*VAL_COLUMNS)])) - {0}
    assert len(train) >= 14 and len(val) >= 8 and not train & val


def test_tiles_are_a_sound_data_folder(tmp_path):
    folder = write_coins(tmp_path / "coins")
    split = load_split(folder)
    assert (len(split.train), len(split.val)) == (24, 3)
    photograph, truth = coins_and_truth()
    strips = [np.asarray(Image.open(pair.image)) for pair in split.val]
    assert np.array_equal(np.concatenate(strips), photograph[:, slice(*VAL_COLUMNS)])
    strips = [np.asarray(Image.open(pair.mask)) > 0 for pair in split.val]
    assert np.array_equal(np.concatenate(strips), truth[:, slice(*VAL_COLUMNS)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demonstration_reaches_its_dice(tmp_path, seed):
    assert demo_run.run(tmp_path / "demo", seed)
