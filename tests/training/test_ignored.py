# SPDX-License-Identifier: Apache-2.0
"""Mask values that count nowhere: not in the loss, the scores, the box or the point."""

import json

import numpy as np
import pytest
import torch
from conftest import rectangle
from PIL import Image
from torch import nn

from samfast import cli
from samfast.training.data import PairDataset
from samfast.training.dataset_goal import DatasetGoal
from samfast.training.evaluate import evaluate
from samfast.training.folders import find_pairs
from samfast.training.losses import LOSSES
from samfast.training.one_mask import OneMask
from samfast.training.settings import FinetuneSettings

SIDE = 64


def trimap(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture, and 1 on its object, 255 on the four pixels around it, else 0."""
    image, inside = rectangle(seed, 48, 64)
    wide = np.zeros_like(inside)
    for dy in range(-4, 5):
        for dx in range(-4, 5):
            wide |= np.roll(inside, (dy, dx), (0, 1))
    return image, np.where(inside, 1, np.where(wide, 255, 0)).astype(np.uint8)


@pytest.fixture(scope="module")
def trimaps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trimaps")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for i in range(6):
        image, mask = trimap(i)
        Image.fromarray(image).save(folder / "images" / f"p{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"p{i}.png")
    return folder


class Free(nn.Module):
    """Logits of its own; ``images`` are the same for all."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images, sizes, boxes=None, names=()):
        valid = torch.zeros(len(images), SIDE, SIDE, dtype=torch.bool)
        valid[:, :48] = True
        return self.logits[: len(images)], valid


def goal_of(folder, loss="bce-dice", **more) -> OneMask:
    settings = FinetuneSettings(data=folder, loss=loss, ignore=(255,), **more)
    goal = OneMask(settings, only_score=True)
    goal.check()
    return goal


def stored(goal) -> torch.Tensor:
    """int (6, 48, 64): what the masks hold."""
    masks = [np.asarray(Image.open(pair.mask)) for pair in goal.split.val]
    return torch.from_numpy(np.stack(masks).astype(int))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_has_no_gradient_there(trimaps, loss):
    goal = goal_of(trimaps, loss)
    (batch,) = goal.validation_loader(goal.split.val, SIDE, 6)
    model = Free(torch.randn(6, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
    total = goal.loss(model, batch)
    (gradient,) = torch.autograd.grad(total, model.logits)
    values = stored(goal)
    inside = gradient[:, :48]
    assert (inside[values == 255] == 0).all() and (gradient[:, 48:] == 0).all()
    assert (inside[values != 255] != 0).all()
    with torch.no_grad():
        model.logits[:, :48][values == 255] = torch.inf
    assert goal.loss(model, batch) == total


def test_the_scores_leave_them_out(trimaps):
    goal = goal_of(trimaps)
    values = stored(goal)
    truth, counts = values == 1, values != 255
    logits = torch.full((6, SIDE, SIDE), -1.0)
    logits[:, 5:30, 10:40] = 1.0
    found = []
    for there in (-3.0, 3.0):
        own = logits.clone()
        own[:, :48][~counts] = there
        loader = goal.validation_loader(goal.split.val, SIDE, 6)
        found.append(goal.scores(Free(own), loader))
        predicted = own[:, :48] > 0
        right = (predicted & truth & counts).sum().item()
        wrong = ((predicted != truth) & counts).sum().item()
        assert found[-1].row["val_dice"] == pytest.approx(2 * right / (2 * right + wrong))
        assert evaluate(Free(own), loader)[0] == pytest.approx(found[-1].row["val_dice"])
        titles = [name for name, _ in goal.overlays(Free(own), list(goal.split.val[:1]), SIDE)]
        assert titles == ["p0"]
    assert found[0] == found[1]
    share = truth.sum().item() / counts.sum().item()
    assert goal.baseline["dice"] == pytest.approx(2 * share / (1 + share))
    assert goal.baseline["iou"] == pytest.approx(share)


@pytest.mark.parametrize("rule", [{}, {"foreground": "any"}, {"foreground": (1,)}])
def test_boxes_and_points_are_those_of_what_counts(trimaps, rule):
    pairs = find_pairs(trimaps)
    for prompt in ("box", "point"):
        data = PairDataset(pairs, SIDE, ignore=(255,), prompt=prompt, random_points=True, **rule)
        for i, sample in enumerate(data[i] for i in range(len(pairs))):
            inside = rectangle(i, 48, 64)[1]
            assert np.array_equal(sample.truth, inside)
            assert np.array_equal(sample.ignored, trimap(i)[1] == 255)
            if prompt == "box":
                rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
                assert sample.box.tolist() == [columns[0], rows[0], columns[-1], rows[-1]]
            else:
                assert inside[int(sample.box[1]), int(sample.box[0])] and sample.box[2] == 1


def test_flips_move_them_too(trimaps):
    data = PairDataset(find_pairs(trimaps), SIDE, ignore=(255,), flips=True, seed=1)
    values = trimap(0)[1]
    turns = [(a, b) for a in (1, -1) for b in (1, -1)]
    ways = {(values == 255)[::a, ::b].tobytes(): (values == 1)[::a, ::b] for a, b in turns}
    seen = set()
    for number in range(12):
        sample = data[0, number]
        assert np.array_equal(ways[sample.ignored.tobytes()], sample.mask)
        assert np.array_equal(sample.ignored, sample.truth_ignored)
        seen.add(sample.ignored.tobytes())
    assert len(seen) == 4


def test_a_dataset_has_them_too(tmp_path):
    settings = FinetuneSettings(output=tmp_path / "out", loss="bce-dice", ignore=(255,))
    goal = DatasetGoal(settings, [trimap(i) for i in range(6)])
    goal.check()
    data, collate = goal.training_data(SIDE)
    assert collate([data[0, 0], data[1, 0]]).ignored.any()
    (batch,) = goal.validation_loader(goal.split.val, SIDE, 6)
    numbers = [item.index for item in goal.split.val]
    assert np.array_equal(batch.truths_ignored[0], trimap(numbers[0])[1] == 255)
    counts = [trimap(i)[1] for i in numbers]
    share = sum((m == 1).sum() for m in counts) / sum((m != 255).sum() for m in counts)
    assert goal.baseline["iou"] == pytest.approx(share)


def test_training_images_have_them(trimaps):
    goal = OneMask(FinetuneSettings(data=trimaps, loss="bce-dice", ignore=(255,)))
    data, collate = goal.training_data(SIDE)
    batch = collate([data[0, 0], data[1, 0]])
    assert batch.ignored.flatten(1).any(1).all() and batch.truths_ignored == []
    assert not (batch.ignored & batch.masks).any()


def test_without_them_a_batch_says_nothing(shared_data):
    goal = OneMask(FinetuneSettings(data=shared_data, loss="bce-dice"), only_score=True)
    (batch,) = goal.validation_loader(goal.split.val, SIDE, 6)
    assert batch.ignored is None and batch.truths_ignored == ()
    assert goal.remembered()["ignore"] is None


@pytest.mark.slow_on_cpu
def test_an_adapter_remembers_them(trimaps, tmp_path, capsys):
    out = tmp_path / "out"
    words = f"finetune --data {trimaps} --output {out} --model vit_tiny --image-size 64 --epochs 1"
    words += " --repeats 1 --val-fraction 0.34 --ignore 255 --prompt box --overlays 1"
    assert cli.main(words.split()) == 0
    record = json.loads((out / "adapter" / "best" / "adapter_config.json").read_text())
    assert find(record, "ignore") == [255]
    capsys.readouterr()
    scored = tmp_path / "scored"
    words = f"evaluate --adapter {out} --data {trimaps} --output {scored} --json"
    assert cli.main(words.split()) == 0
    told = json.loads(capsys.readouterr().out)
    values = np.stack([trimap(i)[1] for i in range(6)])
    share = (values == 1).sum() / (values != 255).sum()
    assert told["all_foreground_iou"] == pytest.approx(share) and len(told["per_image"]) == 6
    image = trimaps / "images" / "p0.png"
    words = f"predict {image} --adapter {out} --output {tmp_path / 'p'} --box 1,1,30,30"
    assert cli.main(words.split()) == 0
    assert cli.main(f"finetune --resume {out} --epochs 2 --ignore 254".split()) == 2
    assert "ignore was 255.0 and is 254.0; a run goes on with" in capsys.readouterr().err


def find(record, name):
    """The value of a key, wherever it is."""
    if isinstance(record, dict):
        if name in record:
            return record[name]
        return next((f for f in (find(v, name) for v in record.values()) if f is not None), None)
    return None


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "words, pattern",
    [
        ("", r"holds 3 values \(0, 1, 255\).*--ignore VALUES excludes values"),
        ("--ignore nan", "ignore has nan; expected finite mask values"),
        ("--foreground 1 255 --ignore 255", "foreground and ignore both hold 255"),
        ("--ignore 0 1 255", "has a pixel that counts; ignore covers all values: 0, 1, 255"),
        ("--ignore 1 255", "no mask in .* has a foreground pixel"),
        (
            "--tasks t.yaml --ignore 1",
            "ignore is an option for one mask; with several tasks, set it",
        ),
    ],
)
def test_what_is_no_such_value_is_refused(trimaps, refused, words, pattern):
    refused("finetune", "--data", trimaps, "--model", "vit_tiny", *words.split(), pattern=pattern)


def test_lossy_masks_under_a_threshold_are_refused(trimaps, tmp_path, refused):
    for kind in ("images", "masks"):
        (tmp_path / "jpg" / kind).mkdir(parents=True)
    for i in range(3):
        image, mask = trimap(i)
        Image.fromarray(image).save(tmp_path / "jpg" / "images" / f"p{i}.png")
        Image.fromarray(mask).save(tmp_path / "jpg" / "masks" / f"p{i}.jpg")
    words = ("--model", "vit_tiny", "--threshold", 0.5, "--ignore", 255)
    pattern = "uses lossy compression, which changes the values to ignore"
    refused("finetune", "--data", tmp_path / "jpg", *words, pattern=pattern)
