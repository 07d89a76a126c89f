# SPDX-License-Identifier: Apache-2.0
"""tasks.yaml, the tasks' files, derived maps, losses and scores."""

import numpy as np
import pytest
import torch
from PIL import Image

from samfast.training import losses
from samfast.training.images import read_values
from samfast.training.many_tasks import ManyTasks, task_loss
from samfast.training.predict_checks import check_files
from samfast.training.task_data import (
    TaskCollate,
    TaskDataset,
    boundary,
    distance,
    flipped,
    resized,
    truth_of,
)
from samfast.training.task_files import check_items, find_items
from samfast.training.task_scores import TaskScores, predicted
from samfast.training.tasks import TaskSpec, read_tasks, specs_from_config

CLASSES = "{name: classes, kind: semantic, channels: 3, ignore: 9}"

NAMED = "{{name: a, kind: semantic, channels: 3, classes: {}}}"


def tasks_file(folder, *entries, head="tasks:"):
    path = folder / "tasks.yaml"
    path.write_text("\n".join([head, *(f"  - {entry}" for entry in entries)]))
    return path


def test_a_file_of_every_kind(tmp_path):
    specs = read_tasks(
        tasks_file(
            tmp_path,
            CLASSES,
            "{name: parts, kind: semantic, channels: 2, classes: [rest, a nucleus]}",
            "{name: edges, derive: boundary, from: classes, weight: 2, loss: balanced-bce}",
            "{name: steps, derive: distance, folder: masks, scale: 0.1}",
            "{name: cells, folder: own, foreground: [3, 4], ignore: [7]}",
            "{name: normals, kind: regression, channels: 3, folder: n, loss: cosine, offset: -1}",
        )
    )
    classes, parts, edges, steps, cells, normals = specs
    assert (classes.kind, classes.channels, classes.loss) == ("semantic", 3, "cross-entropy")
    assert classes.class_names == ("0", "1", "2") and "classes" not in classes.config()
    assert parts.class_names == ("rest", "a nucleus")
    assert (edges.kind, edges.folder, edges.ignore) == ("binary", "masks", (9,))
    assert (edges.weight, edges.loss) == (2, "balanced-bce")
    assert (steps.kind, steps.ignore, steps.scale, steps.loss) == ("regression", (), 0.1, "l1")
    assert (cells.foreground, cells.ignore, cells.loss) == ((3, 4), (7,), "bce-dice")
    assert (normals.channels, normals.loss, normals.offset) == (3, "cosine", -1)
    assert specs_from_config([spec.config() for spec in specs]) == specs


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (("{name: a, chanels: 2}",), "task a has an unknown key 'chanels'; did you mean 'channel"),
        (("{name: a, zzz: 2}",), "task a has an unknown key 'zzz'; known are name, kind"),
        (("{name: a}", "{name: a}"), "two tasks are called a$"),
        (("{kind: binary}",), "task 1 has no name"),
        (("{name: a, kind: semantics, channels: 2}",), "has kind 'semantics'; known are binary"),
        (("{name: a, kind: semantic}",), "give its number of classes with channels"),
        (("{name: a, kind: semantic, channels: 1}",), "has 1 channels; semantic has at least 2"),
        (("{name: a, channels: 2}",), "has 2 channels; binary has 1"),
        (("{name: a, channels: two}",), "has channels 'two', not a whole number"),
        (("{name: a, weight: 0}",), "has weight 0; it must be above 0"),
        (("{name: a, weight: .nan}",), "has weight nan; it must be above 0"),
        (("{name: a, loss: l1}",), "has loss 'l1'; known for binary tasks are bce-dice"),
        (("{name: a, kind: regression, loss: cosine}",), "1 channels, but loss cosine needs 3"),
        (("{name: a, scale: 2}",), "has scale, which only regression masks have"),
        (("{name: a, foreground: []}",), "has an empty foreground"),
        ((NAMED.format("x"),), "has classes 'x', not a list of texts; quote numbers"),
        ((NAMED.format("[x, no, z]"),), r"has classes \['x', False, 'z'\], not a list of texts"),
        ((NAMED.format("[]"),), "has an empty classes; give at least one"),
        ((NAMED.format("[x, y]"),), "has 3 channels, but 2 classes; name each from 0 to 2"),
        ((NAMED.format("[x, y, x]"),), "has two classes called 'x'"),
        ((NAMED.format("[x, y, ' ']"),), "has a class without a name: ' '"),
        (("{name: a, classes: [x]}",), "has classes, which only semantic masks have"),
        (("{name: a, folder: ../b}",), "folder '../b', which is not a folder inside the data"),
        (("{name: a, folder: /etc}",), "folder '/etc', which is not a folder inside the data"),
        (("{name: a, derive: boundry}",), "unknown derive 'boundry'; did you mean 'boundary'"),
        (("{name: a, derive: boundary, channels: 2}",), "has 2 channels; binary has 1"),
        (("{name: a, derive: distance, kind: binary}",), "derive distance is regression with 1"),
        (("{name: a, from: b}",), "has from 'b', but no derive"),
        (
            ("{name: a, derive: boundary, from: b}",),
            "'b', which is not a semantic task; there is no",
        ),
        (
            (CLASSES, "{name: a, derive: boundary, from: classes, ignore: 1}"),
            "has ignore, but also ta",
        ),
        (("{name: a, derive: boundary, foreground: 1}",), "foreground, which only binary masks"),
        (("[a, b]",), "task 1 has no name"),
        (("{name: 'a: b'}",), "'a: b' must consist of letters"),
    ],
)
def test_bad_entries(tmp_path, entries, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        read_tasks(tasks_file(tmp_path, *entries))
    assert str(error.value).startswith(f"{tmp_path / 'tasks.yaml'}: ")
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    for text, sentence in [
        ("tasks: [", "is not valid YAML"),
        ("", "there is no list under tasks:"),
        ("tasks: 3", "there is no list under tasks:"),
        ("task:\n  - {name: a}", "the file has an unknown key 'task'; did you mean 'tasks'"),
        ("tasks:\n  - !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ]:
        (tmp_path / "tasks.yaml").write_text(text)
        with pytest.raises(ValueError, match=sentence) as error:
            read_tasks(tmp_path / "tasks.yaml")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml does not exist"):
        read_tasks(tmp_path / "nothing.yaml")


def test_a_key_given_twice(tmp_path):
    path = tmp_path / "tasks.yaml"
    for text, sentence in [
        (
            "tasks:\n  - name: a\n    channels: 3\n    kind: regression\n    'channels': 3",
            "task a has the key 'channels' twice, in line 3 and in line 5",
        ),
        ("tasks:\n  - {name: a, name: b}", "task a has the key 'name' twice, in line 2 and in l"),
        ("tasks: [{name: a}]\ntasks: [{name: b}]", "the file has the key 'tasks' twice, in line 1"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence) as error:
            read_tasks(path)
        assert str(error.value).startswith(f"{path}: ")
    # What << brings from elsewhere may be given anew, and from several places.
    path.write_text(
        "tasks:\n  - &a {name: a, weight: 2, channels: 3, kind: regression}\n"
        "  - &b {<<: *a, name: b, weight: 3}\n  - {<<: *b, name: c, channels: 1}\n"
    )
    specs = [(spec.name, spec.weight, spec.channels) for spec in read_tasks(path)]
    assert specs == [("a", 2, 3), ("b", 3, 3), ("c", 3, 1)]


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


@pytest.fixture
def data(tmp_path):
    """Four images with classes in masks/, two of them with depth/, and two images of their own."""
    rng = np.random.default_rng(0)
    for i in range(4):
        save(tmp_path / "images" / f"p{i}.png", rng.integers(0, 255, (12, 16, 3), np.uint8))
        labels = rng.integers(0, 3, (12, 16), np.uint8)
        labels[0, 0], labels[0, 1] = 9, 255
        save(tmp_path / "masks" / f"p{i}.png", labels)
        if i < 2:
            save(tmp_path / "depth" / f"p{i}.npy", rng.random((12, 16)) + i)
    for i in range(2):
        save(tmp_path / "own" / "images" / f"p{i}.png", np.full((10, 10, 3), i, np.uint8))
        save(tmp_path / "own" / "masks" / f"p{i}.png", np.eye(10, dtype=np.uint8) * 255)
    return tmp_path


SPECS = (
    TaskSpec("classes", "semantic", 3, ignore=(9,)),
    TaskSpec("depth", "regression", folder="depth"),
    TaskSpec("cells", folder="own"),
)


def test_images_that_tasks_share_are_one_item(data):
    split = find_items(data, SPECS, val_fraction=0.5, seed=2)
    items = sorted((*split.train, *split.val), key=lambda item: str(item.image))
    assert [(item.image.parent.parent.name, sorted(item.targets)) for item in items] == [
        (data.name, ["classes", "depth"]),
        (data.name, ["classes", "depth"]),
        (data.name, ["classes"]),
        (data.name, ["classes"]),
        ("own", ["cells"]),
        ("own", ["cells"]),
    ]
    for spec in SPECS:  # one of two images that have the same tasks
        assert sum(spec.name in item.targets for item in split.val) in (1, 2)
    assert items[1].targets["depth"] == data / "depth" / "p1.npy"
    check_items(items, SPECS)
    assert find_items(data, SPECS, val_fraction=0.5, seed=2) == split
    everything = find_items(data, SPECS, only_score=True)
    assert everything.train == () and set(everything.val) == set(items)


def test_a_split_folder(data):
    for part in ("train", "val"):
        (data / part).mkdir()
    for name in ("images", "masks", "depth"):
        (data / name).rename(data / "train" / name)
    save(data / "val" / "images" / "q.png", np.zeros((4, 4, 3), np.uint8))
    save(data / "val" / "masks" / "q.png", np.arange(16, dtype=np.uint8).reshape(4, 4) % 3)
    split = find_items(data, SPECS[:1])
    assert [item.stem for item in split.val] == ["q"] and len(split.train) == 4
    assert find_items(data, SPECS[:1], only_score=True).val == split.val
    with pytest.raises(FileNotFoundError, match=r"task depth has no folder .*val/depth"):
        find_items(data, SPECS[:2])
    (data / "val" / "depth").mkdir()
    with pytest.raises(ValueError, match="task depth has no image to validate"):
        find_items(data, SPECS[:2])


def test_missing_files(data):
    with pytest.raises(FileNotFoundError, match=r"task x has no folder .*nowhere"):
        find_items(data, [*SPECS, TaskSpec("x", folder="nowhere")])
    (data / "own" / "masks" / "p1.png").unlink()
    with pytest.raises(ValueError, match=r"own/images/p1.png has no mask with the same stem"):
        find_items(data, SPECS)
    (data / "masks" / "p3.png").unlink()
    with pytest.raises(ValueError, match=r"images/p3.png has no mask .* in any task's folder"):
        find_items(data, SPECS[:2])
    (data / "images" / "p0.png").unlink()
    with pytest.raises(ValueError, match=r"p0.png of task classes has no image with the same stem"):
        find_items(data, SPECS[:1])


def test_a_folder_behind_a_link_outside(data, tmp_path_factory):
    (data / "link").symlink_to(tmp_path_factory.mktemp("outside"))
    with pytest.raises(ValueError, match="of task x lies outside the data folder"):
        find_items(data, [TaskSpec("x", folder="link")])


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("masks/p2.png", np.full((12, 16), 3, np.uint8), r"p2.png holds the value 3, but the clas"),
        ("masks/p2.png", np.full((12, 15), 1, np.uint8), r"is 15x12 \(width x height\) but image"),
        ("masks/p2.png", np.full((12, 16, 3), [1, 2, 3]), "whose channels differ"),
        ("depth/p1.npy", np.zeros((12, 16, 2)), "p1.npy holds 2 channels, where 1 are expected"),
        ("depth/p1.npy", np.full((12, 16), np.inf), "p1.npy holds values that are infinite"),
        ("depth/p1.npy", np.array([["a"]]), "p1.npy does not hold an array of numbers"),
        ("depth/p1.npy", np.array([[{}]]), "p1.npy cannot be decoded: Object arrays"),
        (
            "own/masks/p1.png",
            np.full((10, 10), 128, np.uint8),
            "task cells: masks .* together hold|task ce",
        ),
    ],
)
def test_bad_values(data, file, values, sentence):
    save(data / file, values.astype(np.uint8) if file.endswith("png") else values)
    split = find_items(data, SPECS, val_fraction=0.5)
    with pytest.raises(ValueError, match=sentence) as error:
        check_items((*split.train, *split.val), SPECS)
    assert "--foreground" not in str(error.value)


def test_a_task_without_a_pixel_that_counts(data):
    nothing = TaskSpec("classes", "semantic", 3, ignore=(0, 1, 2, 9))
    split = find_items(data, [nothing])
    with pytest.raises(ValueError, match="no mask of task classes has a pixel that counts"):
        check_items((*split.train, *split.val), [nothing])


LABELS = np.array([[0, 0, 1, 1, -1, 2], [0, 0, 1, 1, -1, 2], [0, 0, 0, 0, -1, 2]], np.int32)


def test_a_boundary_is_what_touches_another_class():
    expected = [[0, 1, 1, 0, -1, 0], [0, 1, 1, 1, -1, 0], [0, 0, 1, 1, -1, 0]]
    assert boundary(LABELS).tolist() == expected


def test_a_distance_is_to_the_nearest_pixel_of_the_boundary():
    found = distance(LABELS)
    edge = np.argwhere(boundary(LABELS) == 1)
    for y, x in np.ndindex(LABELS.shape):
        if LABELS[y, x] < 0:
            assert np.isnan(found[y, x])
        else:
            assert found[y, x] == np.float32(np.sqrt(((edge - [y, x]) ** 2).sum(1).min()))
    assert np.isnan(distance(np.zeros((3, 3), np.int32))).all()


def test_stored_values_become_truth():
    stored = np.array([[0, 2, 9, 255]], np.uint8)
    classes = TaskSpec("a", "semantic", 3, ignore=(9,))
    assert truth_of(classes, stored).tolist() == [[0, 2, -1, -1]]
    cells = TaskSpec("a", ignore=(9,))
    assert truth_of(cells, stored).tolist() == [[0, 1, -1, 1]]
    values = TaskSpec("a", "regression", ignore=(0,), scale=0.5, offset=1.0)
    truth = truth_of(values, np.array([[[0], [2], [np.nan], [3]]], np.float32))
    assert np.array_equal(truth, [[[np.nan, 2, np.nan, 2.5]]], equal_nan=True)
    steps = TaskSpec("a", "regression", derive="distance", scale=2.0)
    wanted = 2 * distance(np.array([[0, 0, 0, 1]], np.int32))[None]
    assert np.array_equal(truth_of(steps, np.array([[0, 0, 0, 1]], np.uint8)), wanted)


def test_mirrored_directions_point_the_other_way():
    truth = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    spec = TaskSpec("n", "regression", 3, loss="cosine")
    wide = flipped(spec, truth, [1])
    assert np.array_equal(wide[0], -truth[0, :, ::-1])
    assert np.array_equal(wide[1:], truth[1:, :, ::-1])
    high = flipped(spec, truth, [0])
    assert np.array_equal(high[1], -truth[1, ::-1]) and np.array_equal(high[0], truth[0, ::-1])
    plain = TaskSpec("v", "regression", 3)
    assert np.array_equal(flipped(plain, truth, [0, 1]), truth[:, ::-1, ::-1])


def test_batches_hold_each_task_where_it_is(data, monkeypatch):
    from samfast.training import task_data

    read = []
    monkeypatch.setattr(
        task_data, "read_stored", lambda spec, path: read.append(path) or stored(spec, path)
    )
    from samfast.training.task_files import read_stored as stored

    specs = (*SPECS, TaskSpec("edges", derive="boundary", ignore=(9,)))
    items = find_items(data, specs, only_score=True).val
    dataset = TaskDataset(items, specs, 32)
    chosen = [i for i, item in enumerate(items) if item.stem in ("p1", "p2")]
    batch = TaskCollate(specs, 32, truths=True)([dataset[i] for i in chosen])
    names = [(items[i].image.parent.parent.name, items[i].stem) for i in chosen]
    assert names == [(data.name, "p1"), (data.name, "p2"), ("own", "p1")]
    assert batch.rows == {"classes": [0, 1], "depth": [0], "cells": [2], "edges": [0, 1]}
    assert len(read) == 4  # masks/p1 once for classes and edges, depth/p1, masks/p2, own/p1
    assert batch.sizes.tolist() == [[24, 32], [24, 32], [32, 32]]
    assert batch.targets["classes"].shape == (2, 32, 32)
    assert (batch.targets["classes"][:, 24:] == -1).all()
    assert batch.targets["depth"].shape == (1, 1, 32, 32)
    assert batch.targets["depth"][:, :, 24:].isnan().all()
    assert batch.targets["depth"][:, :, :24].isfinite().all()
    assert batch.truths["cells"][0].shape == (10, 10)
    twice = batch.truths["classes"][0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(batch.targets["classes"][0, :24], twice.long())


def test_flips_of_the_truth_are_those_of_the_image(data):
    specs = (SPECS[0], TaskSpec("grey", "regression", 3, folder="images"))
    items = find_items(data, specs, only_score=True).val
    dataset = TaskDataset(items, specs, 16, flips=True, seed=1)
    seen = set()
    for number in range(6):
        sample = dataset[(0, number)]
        grey = np.moveaxis(sample.targets["grey"], 0, -1).astype(np.uint8)
        assert np.array_equal(grey, sample.image)
        seen.add(sample.image.tobytes())
    assert len(seen) > 1


def test_values_of_files(tmp_path):
    deep = np.arange(6, dtype=np.uint16).reshape(2, 3) * 300
    save(tmp_path / "a.png", deep)
    assert read_values(tmp_path / "a.png", 1)[..., 0].tolist() == deep.tolist()
    floats = np.array([[0.5, np.nan]], np.float32)
    save(tmp_path / "b.tif", floats)
    assert np.array_equal(read_values(tmp_path / "b.tif", 1)[..., 0], floats, equal_nan=True)
    colour = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    save(tmp_path / "c.png", colour)
    assert np.array_equal(read_values(tmp_path / "c.png", 3), colour)
    with pytest.raises(FileNotFoundError, match=r"d\.npy does not exist"):
        read_values(tmp_path / "d.npy", 1)


def logits_of(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_cross_entropy_is_torch_s_of_each_image():
    logits, labels = logits_of(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[0, 2:] = -1
    ours = losses.class_loss(logits, labels)
    each = [
        torch.nn.functional.cross_entropy(logits[i : i + 1], labels[i : i + 1], ignore_index=-1)
        for i in range(2)
    ]
    torch.testing.assert_close(ours, sum(each) / 2)
    gradient = torch.autograd.grad(ours, logits)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(each) / 2, logits)[0])
    assert not gradient[0, :, 2:].any()


def test_losses_of_values_and_directions():
    values, truth = logits_of(2, 3, 4, 5), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    truth[0, :, 2:] = torch.nan
    each = [(values[0] - truth[0])[:, :2].abs().mean(), (values[1] - truth[1]).abs().mean()]
    torch.testing.assert_close(losses.value_loss(values, truth), sum(each) / 2)
    turned = losses.direction_loss(values, truth)
    cosine = (values * truth).sum(1) / (values.norm(dim=1) * truth.norm(dim=1))
    torch.testing.assert_close(turned, ((1 - cosine[0, :2]).mean() + (1 - cosine[1]).mean()) / 2)
    for loss in (losses.value_loss, losses.direction_loss):
        gradient = torch.autograd.grad(loss(values, truth), values)[0]
        assert gradient.isfinite().all() and not gradient[0, :, 2:].any() and gradient[1].any()
    for loss, bad in ((losses.value_loss, truth[:, :1]), (losses.class_loss, truth[:, :2])):
        with pytest.raises(ValueError, match="different shapes"):
            loss(values, bad)


@pytest.mark.parametrize("spec", SPECS)
def test_what_counts_nowhere_has_no_gradient(spec):
    """Whatever the logits hold there; and an image without any pixel that counts."""
    logits = logits_of(2, spec.channels, 3, 3)
    target = torch.full((2, 3, 3), -1)
    target[0, 0] = 1
    if spec.kind == "regression":
        target = torch.where(target < 0, torch.nan, target.double())[:, None]
    with torch.no_grad():
        logits[0, :, 1] = torch.nan
    loss = task_loss(spec, logits, target)
    gradient = torch.autograd.grad(loss, logits)[0]
    assert loss.isfinite() and gradient[0, :, 0].any() and not gradient[0, :, 1:].any()
    empty = logits_of(0, spec.channels, 3, 3)
    nothing = task_loss(spec, empty, target[:0])
    assert nothing == 0 and nothing.requires_grad


def test_scores_of_classes():
    scores = TaskScores(TaskSpec("a", "semantic", 4))
    truth = torch.tensor([[0, 0, 1, 1, -1]])
    scores.update(torch.tensor([[0, 1, 1, 1, 2]]), truth)
    scores.update(torch.tensor([[0, 2, -1 + 1, 0, 0]]), torch.tensor([[0, 0, 0, 0, -1]]))
    # class 0: 1 + 3 of 6 + 0 wrong; class 1: 2 of 3; class 2: 0 of 1; class 3 occurs nowhere
    expected = {"miou": (4 / 6 + 2 / 3 + 0) / 3, "accuracy": 6 / 8}
    assert scores.compute() == pytest.approx(expected)


def test_scores_of_values_are_in_stored_units():
    spec = TaskSpec("a", "regression", scale=0.5, offset=1.0)
    scores = TaskScores(spec)
    stored = torch.tensor([[[2.0, 0.0, torch.nan, 4.0]]])
    scores.update(torch.tensor([[[3.0, 1.0, 7.0, 2.0]]]), 0.5 * stored + 1.0)
    assert scores.compute() == pytest.approx({"abs": (1 + 1 + 2) / 3, "rel": (1 / 2 + 1 / 2) / 2})


def test_scores_of_directions_are_angles():
    scores = TaskScores(TaskSpec("n", "regression", 3, loss="cosine"))
    truth = torch.tensor([[[1.0, 1.0, torch.nan]], [[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]])
    scores.update(torch.tensor([[[2.0, 0, 1]], [[0.0, 3, 1]], [[0.0, 0, 1]]]), truth)
    assert scores.compute() == pytest.approx({"angle": 45.0})


def test_angles_of_directions_as_colours():
    """Their length, scale and offset do not matter: 0 to 255 for -1 to 1 is the same direction."""
    spec = TaskSpec("n", "regression", 3, loss="cosine", scale=2 / 255, offset=-1.0)
    maps = torch.tensor([0.6, 0.0, 0.8]).view(3, 1, 1)
    for factor, angle in ((1.0, 0.0), (3.0, 0.0), (0.1, 0.0), (-1.0, 180.0)):
        scores = TaskScores(spec)
        scores.update(predicted(spec, factor * maps), maps)
        assert scores.compute()["angle"] == pytest.approx(angle, abs=0.05)  # acos near 1


def test_values_to_ignore_are_those_of_the_file():
    """-99.9 is no float32."""
    spec = TaskSpec("a", "regression", ignore=(-99.9,))
    assert np.isnan(truth_of(spec, np.full((2, 2, 1), -99.9, np.float32))).all()


def test_a_boundary_survives_the_model_s_size(tmp_path):
    """It is found at that size: every edge is there, whatever the file's."""
    labels = np.zeros((300, 300), np.uint8)
    for i in range(10):
        labels[:, 15 + 30 * i :] += 1
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(labels).save(tmp_path / "masks" / "a.png")
    spec = TaskSpec("edges", derive="boundary")
    (item,) = find_items(tmp_path, (spec,), only_score=True).val
    sample = TaskDataset([item], (spec,), 32)[0]
    assert np.array_equal(sample.targets["edges"], boundary(resized(labels.astype(np.int32), 32)))
    assert (np.diff(sample.targets["edges"][0]) == 1).sum() >= 9
    assert sample.truths["edges"].shape == (300, 300)


def test_files_of_one_name_are_refused():
    road, overlay = TaskSpec("road"), TaskSpec("road_overlay")
    check_files(["x", "y"], (road,))
    with pytest.raises(ValueError, match="image x and task road, and image x and task road_ov"):
        check_files(["x"], (road, overlay))
    with pytest.raises(ValueError, match="would both write x_road_mask;"):
        check_files(["x", "x_road"], (TaskSpec("mask"), TaskSpec("road_mask")))
    maps = (road, TaskSpec("road_probability", kind="regression"))
    check_files(["x"], maps)
    with pytest.raises(ValueError, match="would both write x_road_probability;"):
        check_files(["x"], maps, probable=True)


def test_a_task_whose_validation_masks_are_empty(data):
    specs = (TaskSpec("classes", "semantic", 3, ignore=(0, 1, 2, 9)),)
    goal = ManyTasks.__new__(ManyTasks)
    goal.specs, goal.split = specs, find_items(data, SPECS, only_score=True)
    with pytest.raises(ValueError, match="task classes cannot be scored: every pixel of its valid"):
        goal._constant(specs[0])


def test_scores_of_a_mask_leave_out_what_counts_nowhere():
    scores = TaskScores(TaskSpec("a"))
    scores.update(torch.tensor([[True, True, True]]), torch.tensor([[1, 0, -1]]))
    assert scores.compute() == pytest.approx({"dice": 2 / 3, "iou": 1 / 2})
