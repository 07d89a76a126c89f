# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on a dataset of the user's own, in place of a folder."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import rectangle
from PIL import Image
from test_resume import Ended, EndsAt, results

from samfast.training.dataset_goal import DatasetGoal, Item, ItemDataset, read_item
from samfast.training.loop import finetune
from samfast.training.settings import FinetuneSettings

FOUND = rectangle(1, 40, 64)


class Noisy(torch.utils.data.Dataset):
    """Draws from every generator, as augmentations do."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image, mask = rectangle(index, 40 + 4 * index, 64)
        shift = random.randrange(9) + int(np.random.randint(9)) + int(torch.randint(9, ()))
        return {"image": np.minimum(image, 246) + np.uint8(shift), "mask": mask}


def settings_for(output, **options) -> FinetuneSettings:
    more = {"model": "vit_tiny", "image_size": 64, "epochs": 2, "repeats": 1, "val_fraction": 0.34}
    return FinetuneSettings(output=output, **{**more, "batch_size": 1, "lr": 3e-3, **options})


@pytest.mark.slow_on_cpu
def test_a_run_learns_from_a_dataset_and_goes_on(tmp_path):
    """With the same final bytes, though the dataset draws random numbers."""
    settings = settings_for(tmp_path / "a", dropout=0.1, save_every=1)
    summary = finetune(settings, Noisy())
    assert summary["val_dice"] > 0.1
    saved = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert len(saved["train"]) == 4 and len(saved["val"]) == 2
    again = replace(settings, output=tmp_path / "b")
    with pytest.raises(Ended):
        finetune(again, Noisy(), callbacks=[EndsAt(3)])
    finetune(replace(again, resume="newest"), dataset=Noisy())
    assert results(tmp_path / "b") == results(tmp_path / "a")


def test_samples_do_not_depend_on_who_loads_them():
    items = [Item(Noisy(), "train", index) for index in range(3)]
    data = ItemDataset(items, 64, same=False, seed=7)
    first = [data[index, number].image for index in range(3) for number in range(2)]
    random.seed(5)
    state = torch.get_rng_state()
    again = [data[index, number].image for index in range(3) for number in range(2)]
    assert all(map(np.array_equal, first, again)) and torch.equal(state, torch.get_rng_state())
    assert not np.array_equal(first[0], first[1])  # another pass
    still = ItemDataset(items, 64, same=True, seed=7)
    assert still[0, 0].name == still[0, 1].name == "train-00000"
    assert np.array_equal(still[0, 0].image, still[0, 1].image)


@pytest.mark.parametrize(
    "item",
    [
        FOUND,
        list(FOUND),
        {"image": Image.fromarray(FOUND[0]), "mask": Image.fromarray(FOUND[1])},
        (torch.from_numpy(FOUND[0]).permute(2, 0, 1), torch.from_numpy(FOUND[1])[None].long()),
    ],
    ids=["arrays", "list", "PIL", "tensors"],
)
def test_what_an_item_may_be(item):
    image, values = read_item(Item([item], "train", 0), 0)
    assert np.array_equal(image, FOUND[0]) and np.array_equal(values > 0, FOUND[1])


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (read_item(Item([(image, np.ones((4, 4), bool))], "train", 0), 0)[0] == 255).all()


@pytest.mark.parametrize(
    "item, pattern",
    [
        (FOUND[0], "it is a ndarray; expected (image, mask)"),
        ({"image": FOUND[0], "label": 3}, "it has the keys image, label; expected image, mask"),
        ((FOUND[0] / 255.0, FOUND[1]), "its image is float64 (40, 64, 3); expected uint8"),
        ((FOUND[0][..., :2], FOUND[1]), "its image is uint8 (40, 64, 2)"),
        ((FOUND[0], FOUND[1] * 1.0), "its mask is float64 (40, 64); expected bool or whole"),
        ((Image.new("I;16", (4, 4)), FOUND[1]), "its image has PIL's mode I;16; expected one of"),
        ((FOUND[0][:0], FOUND[1][:0]), "its image has no pixels"),
        ((FOUND[0], FOUND[1][1:]), "image and mask are 40x64 and 39x64 (height x width)"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_an_item_that_is_none(item, pattern):
    with pytest.raises(ValueError, match=re.escape(f"item 0 of the dataset (val): {pattern}")):
        read_item(Item([item], "val", 0), 0)


def masks(*values):
    return [(FOUND[0], (FOUND[1] * value).astype(np.int16)) for value in values]


@pytest.mark.parametrize(
    "dataset, options, pattern",
    [
        (iter(()), {}, "expected one with a length and numbered items"),
        ([], {}, "has no items"),
        (masks(1), {}, "has 1 item; training and validation need at least 2"),
        ({"train": masks(1), "test": masks(1)}, {}, "datasets are train, test; expected train and"),
        (masks(1, 1), {"data": "x"}, "data is x, but a dataset is given; leave out one"),
        (masks(1, 1), {"bands": "1"}, "bands is about files"),
        (masks(1, 1), {"output": None}, "does not name the output folder; set output"),
        ({"train": masks(1, 2), "val": masks(1)}, {}, "hold the values 1, 2 besides 0; say"),
        (masks(0, -1), {}, "hold the values -1 besides 0"),
        ({"train": masks(1), "val": masks(0)}, {}, "none of the validation masks has a foregr"),
    ],
    ids=range(10),
)
def test_a_dataset_that_cannot_be_used(dataset, options, pattern, tmp_path):
    with pytest.raises(ValueError, match=pattern):
        DatasetGoal(settings_for(**{"output": tmp_path, **options}), dataset).check()
