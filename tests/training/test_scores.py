# SPDX-License-Identifier: Apache-2.0
"""Validation: the loss, what each image and class scores, and the tables of them."""

import csv
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from samfast.training.evaluate import evaluate, predicted_masks
from samfast.training.many_tasks import ManyTasks
from samfast.training.metrics import ForegroundScores, MeanLoss
from samfast.training.one_mask import OneMask
from samfast.training.records import RunFolder
from samfast.training.score_files import classes_csv, score_files, scores_csv
from samfast.training.scored import class_scores, class_sums, foreground_scores, foreground_sums
from samfast.training.settings import FinetuneSettings
from samfast.training.task_scores import TaskScores
from samfast.training.tasks import TaskSpec

SIDE = 64
KINDS = ("images", "masks")
CLASSES = TaskSpec("classes", "semantic", 3, classes=("rest", "cell", "none"), weight=2.0)
EDGES = TaskSpec("edges", derive="boundary", weight=0.5)
DEPTH = TaskSpec("depth", "regression", folder="depth", scale=0.1)
SPECS = (CLASSES, EDGES, DEPTH)


class Fake(nn.Module):
    """Logits that are a function of each image alone, with the same bits in every batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.02))

    def maps(self, images):
        return torch.stack([self.weight * (image.float().mean(0) - 50) for image in images])

    def forward(self, images, sizes, boxes=None, names=()):
        maps = self.maps(images)
        if not isinstance(boxes, dict):
            return maps, torch.stack([(m * 0 == 0) & (m > -1.8) for m in maps])
        planes = {"classes": torch.stack([-maps, maps, maps - 9], 1)}
        planes |= {"edges": maps[:, None], "depth": maps[:, None]}
        return {name: planes[name][rows] for name, rows in boxes.items()}


@pytest.fixture(scope="module")
def task_data(shared_data, tmp_path_factory):
    """The classes 0 and 1 of six images, the depth of three of these."""
    folder = tmp_path_factory.mktemp("scores")
    for kind in ("images", "masks", "depth"):
        (folder / kind).mkdir()
    for i in range(6):
        image, mask = (np.asarray(Image.open(shared_data / k / f"p{i}.png")) for k in KINDS)
        Image.fromarray(image).save(folder / "images" / f"p{i}.png")
        Image.fromarray((mask > 0).astype(np.uint8)).save(folder / "masks" / f"p{i}.png")
        if i % 2:
            depth = np.where(mask > 0, np.float32(10), np.float32(i))
            Image.fromarray(depth).save(folder / "depth" / f"p{i}.tif")
    return folder


def goals(shared_data, task_data):
    one = OneMask(FinetuneSettings(data=shared_data, loss="bce-dice"), only_score=True)
    many = ManyTasks(FinetuneSettings(data=task_data), SPECS, only_score=True)
    for goal in (one, many):
        goal.check()
        yield goal


def test_scores_do_not_depend_on_the_batches(shared_data, task_data):
    for goal in goals(shared_data, task_data):
        ticks, found = [], []
        for size in (1, 4, 6):
            loader = goal.validation_loader(goal.split.val, SIDE, size)
            found.append(goal.scores(Fake(), loader, ticks.append))
        assert found[0] == found[1] == found[2]
        assert ticks == [1] * 6 + [4, 2] + [6]
        row, images, classes = found[0]
        assert tuple(row) == tuple(goal.columns) and goal.columns[0] == "val_loss"
        assert [i["image"] for i in images if i.get("task") in (None, "edges")] == [
            f"p{i}" for i in range(6)
        ]
        assert len(images) == (6 if goal.tasks is None else 15)
        assert len(classes) == (0 if goal.tasks is None else 3)


def test_the_validation_loss_is_that_of_training(shared_data, task_data):
    """Of tasks the weighted sum of the means over the images that have each."""
    one, many = goals(shared_data, task_data)
    model = Fake().eval()
    (whole,) = one.validation_loader(one.split.val, SIDE, 6)
    row = one.scores(model, one.validation_loader(one.split.val, SIDE, 4)).row
    assert row["val_loss"] == pytest.approx(one.loss(model, whole).item(), rel=1e-6)
    (whole,) = many.validation_loader(many.split.val, SIDE, 6)
    row = many.scores(model, many.validation_loader(many.split.val, SIDE, 4)).row
    assert row["val_loss"] == pytest.approx(many.loss(model, whole).item(), rel=1e-6)
    assert row["val_loss"] > 0.1


def test_an_unknown_loss_has_no_column(shared_data):
    goal = OneMask(FinetuneSettings(data=shared_data), only_score=True)
    goal.check()
    row = goal.scores(Fake(), goal.validation_loader(goal.split.val, SIDE, 4)).row
    assert list(row) == ["val_dice", "val_iou"] == list(goal.summary(row))[:2]
    assert "val loss" not in goal.table(row)


def test_images_add_up_to_the_whole(shared_data, task_data):
    one, many = goals(shared_data, task_data)
    alone = []
    for pair in one.split.val:
        row, (image,), _ = one.scores(Fake(), one.validation_loader([pair], SIDE, 1))
        alone.append(image)
        assert (image["dice"], image["iou"]) == pytest.approx((row["val_dice"], row["val_iou"]))
    assert one.scores(Fake(), one.validation_loader(one.split.val, SIDE, 4)).images == alone
    for item in many.split.val[1::2]:
        row, images, classes = many.scores(Fake(), many.validation_loader([item], SIDE, 1))
        by_task = {image["task"]: image for image in images}
        for name in ("classes_miou", "classes_accuracy", "edges_dice", "depth_abs", "depth_rel"):
            task, score = name.split("_")
            assert by_task[task][score] == pytest.approx(row[f"val_{name}"])
        assert by_task["classes"]["classes"] == {c["name"]: c["iou"] for c in classes}
        assert classes[2] == {
            **{"task": "classes", "class": 2, "name": "none"},
            **{"iou": None, "pixels": 0, "predicted": 0},
        }


@pytest.mark.parametrize("training", [True, False])
def test_a_tick_that_raises_leaves_the_mode(shared_data, task_data, training):
    def stop(images):
        raise KeyboardInterrupt

    for goal in goals(shared_data, task_data):
        model = Fake().train(training)
        with pytest.raises(KeyboardInterrupt) as kept:
            goal.scores(model, goal.validation_loader(goal.split.val, SIDE, 2), stop)
        assert model.training == training and torch.is_grad_enabled()
        del kept


def test_a_loss_that_is_not_finite_shows():
    for bad in (math.nan, math.inf):
        losses = MeanLoss()
        for value in (1.0, bad, 3.0):
            losses.update(torch.tensor(value))
        assert math.isnan(losses.compute())
    losses = MeanLoss()
    for value in (1.0, 2.0, 6.0):
        losses.update(torch.tensor(value))
    assert losses.compute() == 3.0


def test_the_scores_of_one_image():
    truth = torch.tensor([[True, True, False, False]])
    sums = foreground_sums(torch.tensor([[True, False, True, False]]), truth)
    assert foreground_scores(sums.tolist()) == {"dice": 2 / 4, "iou": 1 / 3}
    empty = foreground_sums(~truth & truth, ~truth & truth)
    assert foreground_scores(empty.tolist()) == {"dice": 1.0, "iou": 1.0}
    labels = torch.tensor([[0, 0, 1, -1]], dtype=torch.int32)
    sums = class_sums(torch.tensor([[0, 1, 1, 2]]), labels, 3)
    assert class_scores(sums.tolist(), ("a", "b", "c")) == {
        **{"miou": 0.5, "accuracy": 2 / 3},
        "classes": {"a": 0.5, "b": 0.5, "c": None},
    }


def test_an_image_without_a_pixel_that_counts_has_no_score():
    nothing = torch.full((2, 2), -1, dtype=torch.int32)
    for spec, truth in (
        (TaskSpec("a"), nothing),
        (TaskSpec("a", "semantic", 2), nothing),
        (TaskSpec("a", "regression"), torch.full((1, 2, 2), torch.nan)),
    ):
        scores = TaskScores(spec)
        prediction = torch.zeros(truth.shape, dtype=torch.int64)
        prediction = prediction == 1 if spec.kind == "binary" else prediction
        own = scores.image(scores.update(prediction, truth))
        assert own.pop("classes", {"0": None, "1": None}) == {"0": None, "1": None}
        assert list(own.values()) == [None, None]


ODD = ("a,b", "c\nd", "e\rf", 'g"h', "ü", "caf\udce9")


def read(data: bytes) -> list[dict]:
    return list(csv.DictReader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")))


def test_odd_names_come_back():
    rows = read(scores_csv([{"image": name, "dice": i / 10} for i, name in enumerate(ODD)]))
    assert [(row["image"], float(row["dice"])) for row in rows] == [
        (name, i / 10) for i, name in enumerate(ODD)
    ]


def test_the_worst_image_of_each_task_comes_first():
    images = [
        {"image": "a", "task": "t", "miou": 0.5, "classes": {"x": 0.0, "y": None}},
        {"image": "a", "task": "d", "abs": 1.0},
        {"image": "b", "task": "t", "miou": None, "classes": {"x": None, "y": None}},
        {"image": "c", "task": "t", "miou": 0.1, "classes": {"x": 0.1, "y": 0.1}},
        {"image": "c", "task": "d", "abs": 2.0},
    ]
    rows = read(scores_csv(images))
    assert [(row["task"], row["image"]) for row in rows] == [
        *(("t", "c"), ("t", "a"), ("t", "b"), ("d", "c"), ("d", "a"))
    ]
    assert list(rows[0]) == ["image", "task", "miou", "abs", "iou_x", "iou_y"]
    assert (rows[1]["iou_x"], rows[1]["iou_y"]) == ("0.0", "")


def test_classes_are_a_table_of_their_own():
    row = {"task": "t", "class": 0, "name": "a,b", "iou": None, "pixels": 0, "predicted": 0}
    assert classes_csv([row]).endswith(b'\nt,0,"a,b",,0,0\n')
    assert read(classes_csv([row])) == [{k: "" if v is None else str(v) for k, v in row.items()}]
    assert list(score_files([{"image": "a", "dice": 1.0}], [])) == ["scores.csv"]
    assert list(score_files([], [row])) == ["scores.csv", "classes.csv"]


def test_the_board_gets_scalars_and_panels(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    row = {"epoch": 3, "step": 6, "train_loss": 2.0, "val_loss": 1.5, "lr": 0.25}
    row |= {"images_per_second": 1.0, "peak_memory_mib": 1.0}
    with RunFolder(tmp_path / "out", {}, ("val_loss",), lambda rows: b"") as folder:
        folder.begin()
        (tmp_path / "out" / "adapter" / "best").mkdir(parents=True)
        (tmp_path / "out" / "adapter" / "best" / "adapter_model.safetensors").touch()
        folder.add_epoch(row)
        folder.add_overlay("a\nb", Image.new("RGB", (3200, 100), "red"))
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    board.Reload()
    for name in ("lr", "val_loss"):
        ((step, value),) = [(event.step, event.value) for event in board.Scalars(name)]
        assert (step, value) == (3, row[name])
    (event,) = board.Images("overlays/a\\nb")
    assert (event.step, event.width, event.height) == (3, 1600, 50)
    assert Image.open(tmp_path / "out" / "overlays" / "a\nb.png").width == 3200


def test_scores_equal_those_of_masks(shared_data):
    """The row is made of the same counts as ever."""
    goal = OneMask(FinetuneSettings(data=shared_data, loss="bce-dice"), only_score=True)
    goal.check()
    loader = goal.validation_loader(goal.split.val, SIDE, 4)
    scores = ForegroundScores()
    for predicted, truth in predicted_masks(Fake(), loader):
        scores.update(predicted, truth)
    row = goal.scores(Fake(), loader).row
    assert (row["val_dice"], row["val_iou"]) == scores.compute() == evaluate(Fake(), loader)
    assert 0.1 < row["val_dice"] < 1
