# SPDX-License-Identifier: Apache-2.0
"""Random changes of training images: masks follow them, and who loads them changes no bit."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import ended, results, settings_for
from torch.utils.data import DataLoader

from samfast.models import build_sam
from samfast.training.augment import AMOUNTS, change_of, check_augment
from samfast.training.data import Collate, EpochSampler, PairDataset
from samfast.training.dataset_goal import DatasetGoal, Item, ItemDataset
from samfast.training.dry_run import dry_run
from samfast.training.embeddings import keeps_training_images
from samfast.training.folders import load_split
from samfast.training.loop import finetune
from samfast.training.many_tasks import ManyTasks
from samfast.training.one_mask import OneMask
from samfast.training.settings import FinetuneSettings
from samfast.training.task_data import TaskDataset, boundary, distance
from samfast.training.task_files import find_items
from samfast.training.tasks import TaskSpec

KINDS = ("light", "strong")


def painted() -> tuple[np.ndarray, np.ndarray]:
    """A white ellipse off the centre of a black image of 90 x 120, and its mask."""
    y, x = np.mgrid[:90, :120]
    mask = ((x - 70) / 25) ** 2 + ((y - 40) / 15) ** 2 < 1
    return np.repeat(mask[..., None] * np.uint8(255), 3, axis=2), mask


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_follow_their_images(kind):
    items = [Item([painted()], "train", 0)]
    data = ItemDataset(items, 120, same=False, flips=True, augment=kind, prompt="box", seed=3)
    seen, shares = set(), []
    for number in range(12):
        sample = data[0, number]
        assert sample.image.shape == (90, 120, 3) and sample.mask.dtype == bool
        assert iou(sample.image.mean(2) > 127, sample.mask) > 0.94
        rows, columns = sample.mask.any(1).nonzero()[0], sample.mask.any(0).nonzero()[0]
        assert sample.box.tolist() == [columns[0], rows[0], columns[-1], rows[-1]]
        seen.add(sample.mask.tobytes())
        if kind == "light":
            assert sample.ignored is None
        else:  # what comes in from outside counts nowhere, and is black
            assert not (sample.ignored & (sample.image.mean(2) > 127)).any()
            shares.append(sample.ignored.mean())
    assert kind == "light" or 0 < max(shares) < 0.6
    assert len(seen) == (12 if kind == "strong" else 4)


def test_a_point_is_on_the_changed_mask():
    items = [Item([painted()], "train", 0)]
    data = ItemDataset(
        items, 120, same=False, augment="strong", prompt="point", random_points=True, seed=3
    )
    for number in range(6):
        sample = data[0, number]
        x, y, label = sample.box
        assert label == 1 and sample.mask[int(y), int(x)]


def test_numbers_stay_within_what_is_said_and_reach_it():
    most = AMOUNTS["strong"]
    changes = [change_of("strong", 1, number, index) for number in range(40) for index in range(20)]
    for name in ("brightness", "contrast", "saturation"):
        values = np.array([getattr(change, name) for change in changes]) - 1
        assert 0.22 < values.max() <= most.brightness and -0.22 > values.min() >= -most.brightness
    scales = [change.scale for change in changes]
    assert 0.8 <= min(scales) < 0.82 and 1.22 < max(scales) <= 1.25
    turns = [change.turn for change in changes]
    assert -30 <= min(turns) < -28 and 28 < max(turns) <= 30
    shifts = [part for change in changes for part in change.shift]
    assert -0.1 <= min(shifts) < -0.09 and 0.09 < max(shifts) <= 0.1
    assert 350 < sum(change.blur > 0 for change in changes) < 450
    assert 350 < sum(change.noise > 0 for change in changes) < 450
    light = change_of("light", 1, 2, 3)
    assert not light.moves and (light.saturation, light.hue, light.blur, light.noise) == (
        1,
        0,
        0,
        0,
    )
    assert change_of("none", 1, 2, 3) is None


def epochs(data, workers: int) -> list[torch.Tensor]:
    """The images and masks of three epochs."""
    sampler = EpochSampler(len(data), seed=1)
    loader = DataLoader(
        data,
        2,
        sampler=sampler,
        collate_fn=Collate(64, truths=False),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    found = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in loader:
            found += [batch.images, batch.masks]
    return found


@pytest.mark.parametrize("kind", ["strong", pytest.param("light", marks=pytest.mark.slow)])
def test_the_same_bits_for_any_number_of_workers(shared_data, kind):
    pairs = load_split(shared_data).train
    data = PairDataset(pairs, 64, flips=True, augment=kind, seed=1)
    alone, together = epochs(data, 0), epochs(data, 2)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    other = replace_seed(data, 2)[0, 0]
    assert not np.array_equal(other.image, data[0, 0].image)  # another seed
    assert not np.array_equal(data[0, 0].image, data[0, 1].image)  # another pass
    plain = PairDataset(pairs, 64, flips=True, seed=1)
    assert not np.array_equal(plain[0, 0].image, data[0, 0].image)
    assert data[0, 0].name is None


def replace_seed(data: PairDataset, seed: int) -> PairDataset:
    return PairDataset(data.pairs, 64, flips=True, augment=data.augment, seed=seed)


def test_without_it_nothing_changes(shared_data):
    pairs = load_split(shared_data).train
    named = PairDataset(pairs, 64, flips=True, augment="none", seed=1)
    plain = PairDataset(pairs, 64, flips=True, seed=1)
    for key in ((0, 0), (1, 5)):
        assert all(
            np.array_equal(a, b) for a, b in zip(named[key][:3], plain[key][:3], strict=True)
        )
    still = PairDataset(pairs, 64, augment="none")[0]
    assert np.array_equal(still.image, np.asarray(Image.open(pairs[0].image)))


TASKS = (
    TaskSpec("classes", "semantic", 3, ignore=(9,)),
    TaskSpec("edges", derive="boundary", ignore=(9,)),
    TaskSpec("steps", "regression", derive="distance", ignore=(9,), scale=0.5),
    TaskSpec("cells", folder="cells"),
)


@pytest.fixture
def tasks_data(tmp_path):
    """Two images of 60 x 60 whose grey is 100 times the class, white where a cell is."""
    y, x = np.mgrid[:60, :60]
    labels = ((x > 20).astype(np.uint8) + (y > 35)).astype(np.uint8)
    cells = (x - 40) ** 2 + (y - 20) ** 2 < 64
    image = np.repeat((100 * labels)[..., None], 3, axis=2)
    for folder, values in (("images", image), ("masks", labels), ("cells", cells * np.uint8(255))):
        (tmp_path / folder).mkdir()
        for name in ("a.png", "b.png"):
            Image.fromarray(values).save(tmp_path / folder / name)
    return tmp_path


def test_every_task_follows(tasks_data):
    items = find_items(tasks_data, TASKS, only_score=True).val
    data = TaskDataset(items, TASKS, 60, flips=True, augment="strong", seed=2)
    plain = TaskDataset(items, TASKS, 60, seed=2)[0]
    outside = []
    for number in range(6):
        sample = data[0, number]
        classes, edges = sample.targets["classes"], sample.targets["edges"]
        known = classes >= 0
        outside.append((~known).mean())
        assert np.array_equal(edges, boundary(classes))
        steps = 0.5 * distance(classes)
        assert np.array_equal(sample.targets["steps"][0], steps, equal_nan=True)
        assert np.array_equal(sample.targets["cells"] == -1, ~known)
        grey = sample.image.mean(2)[known]
        order = [np.median(grey[classes[known] == c]) for c in range(3)]
        assert order[0] + 40 < order[1] and order[1] + 40 < order[2]
    assert 0 < max(outside) < 0.6 and not (plain.targets["classes"] == -1).any()


@pytest.mark.parametrize("spec", [{"channels": 3, "loss": "cosine"}, {"channels": 1}])
def test_measured_values_do_not_follow_strong_changes(data, spec):
    specs = (TaskSpec("slope", "regression", folder="images", **spec),)
    settings = FinetuneSettings(data=data, augment="strong", method="lora")
    with pytest.raises(ValueError, match="augment is strong, but task slope has measured values"):
        ManyTasks(settings, specs)
    ManyTasks(replace(settings, augment="light"), specs)


def test_embeddings_of_changed_images_are_not_kept(shared_data):
    sam = build_sam("vit_tiny", image_size=64)
    sam.image_encoder.requires_grad_(False)
    settings = FinetuneSettings(method="decoder", flips=False, augment="light")
    assert not keeps_training_images(sam, settings)
    assert keeps_training_images(sam, replace(settings, augment="none"))
    pairs = load_split(shared_data).train
    assert PairDataset(pairs, 64, augment="light")[0].name is None


@pytest.mark.slow
def test_a_dry_run_knows_what_is_kept():
    settings = FinetuneSettings(method="decoder", flips=False, augment="light", dry_run=True)
    settings = replace(settings, model="vit_tiny", image_size=64)
    assert dry_run(settings)["embeddings_of"] == "validation"
    assert dry_run(replace(settings, augment="none"))["embeddings_of"] == "all"


def test_without_torchvision_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    check_augment("none")
    with pytest.raises(ImportError, match=r"augment light needs torchvision, .* pip install"):
        check_augment("light")


def test_an_unknown_kind_is_refused(shared_data, refused):
    arguments = ("finetune", "--data", shared_data, "--model", "vit_tiny", "--augment", "some")
    refused(*arguments, pattern="none.*light.*strong")


@pytest.mark.slow_on_cpu
def test_a_resumed_run_goes_on_with_the_same_bits(shared_data, tmp_path):
    settings = settings_for(shared_data, tmp_path / "a", augment="strong")
    finetune(settings)
    again = replace(settings, output=tmp_path / "b")
    ended(again, 3)
    with pytest.raises(ValueError, match="augment was strong and is light; a run goes on with"):
        finetune(replace(again, resume="newest", augment="light"))
    finetune(replace(again, resume="newest"))
    assert results(tmp_path / "b") == results(tmp_path / "a")


def test_only_training_images_change(shared_data, tasks_data):
    one = FinetuneSettings(data=shared_data, augment="strong", flips=False, method="lora")
    tasks = replace(one, data=tasks_data)
    dataset = [painted()] * 4
    mine = replace(one, data=None, output=tasks_data / "out")
    for goal in (OneMask(one), ManyTasks(tasks, TASKS), DatasetGoal(mine, dataset)):
        assert goal.training_data(64)[0].augment == "strong" and goal.steady() == 0
        assert goal.validation_loader(goal.split.val, 64, 1).dataset.augment == "none"
