# SPDX-License-Identifier: Apache-2.0
"""A data folder in COCO's format trains as the folder of label images with the same objects."""

import json

import numpy as np
import pytest
from PIL import Image

from samfast import cli
from samfast.training.chosen_tasks import INSTANCES
from samfast.training.coco_folders import ROBOFLOW
from samfast.training.fingerprints import of_files
from samfast.training.object_maps import object_maps
from samfast.training.object_scores import matched
from samfast.training.objects import Objects
from samfast.training.objects_out import ImageObjects, coco_json
from samfast.training.prompted_data import read_objects
from samfast.training.prompted_objects import PromptedObjects
from samfast.training.settings import FinetuneSettings
from samfast.training.task_data import TaskDataset
from samfast.training.task_files import find_items, read_stored

SIZE = (40, 56)


def labels_of(i):
    labels = np.zeros(SIZE, np.uint8)
    labels[4 : 14 + i, 5:20] = 1
    labels[20:36, 18 + i : 50] = 2
    return labels


def write_images(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        Image.fromarray(labels_of(i) * 100).save(folder / f"{i}.png")


def annotations(numbers):
    return json.loads(
        coco_json([ImageObjects(f"{i}.png", Objects.from_labels(labels_of(i))) for i in numbers])
    )


@pytest.fixture
def roboflow(tmp_path):
    for part, numbers in (("train", (0, 1, 2)), ("valid", (3,)), ("test", (4,))):
        write_images(tmp_path / "rf" / part, numbers)
        (tmp_path / "rf" / part / ROBOFLOW).write_text(json.dumps(annotations(numbers)))
    return tmp_path / "rf"


def test_samples_are_those_of_label_images(roboflow, tmp_path):
    for part, numbers in (("train", (0, 1, 2)), ("val", (3,))):
        write_images(tmp_path / "own" / part / "images", numbers)
        (tmp_path / "own" / part / "masks").mkdir()
        for i in numbers:
            Image.fromarray(labels_of(i)).save(tmp_path / "own" / part / "masks" / f"{i}.png")
    ours, theirs = (find_items(tmp_path / name, INSTANCES) for name in ("own", "rf"))
    for part in ("train", "val"):
        own, coco = getattr(ours, part), getattr(theirs, part)
        assert [item.stem for item in own] == [item.stem for item in coco]
        first, second = (
            TaskDataset(items, INSTANCES, 32, flips=True, seed=1) for items in (own, coco)
        )
        for i in range(len(own)):
            a, b = first[i, 1], second[i, 1]
            assert np.array_equal(a.image, b.image)
            for spec in INSTANCES:
                for kind in ("targets", "truths"):
                    one, other = (getattr(s, kind)[spec.name] for s in (a, b))
                    np.testing.assert_array_equal(one, other)


def test_a_changed_annotation_is_noticed(roboflow):
    def digests():
        return [of_files([i.targets["depth"]]) for i in find_items(roboflow, INSTANCES).train]

    before = digests()
    path = roboflow / "train" / ROBOFLOW
    content = annotations((0, 1, 2))
    content["annotations"] = content["annotations"][1:]
    path.write_text(json.dumps(content))
    assert [a == b for a, b in zip(before, digests(), strict=True)] == [False, True, True]


def test_crowds_count_nowhere(roboflow):
    path = roboflow / "valid" / ROBOFLOW
    content = annotations((3,))
    content["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    (item,) = find_items(roboflow, INSTANCES).val
    labels, truth = read_stored(INSTANCES[0], item.targets["depth"]), labels_of(3)
    np.testing.assert_array_equal(labels, np.where(truth == 2, -1, truth.astype(int)))
    maps = object_maps(labels)
    hidden = labels < 0
    assert (maps["foreground"][hidden] == -1).all() and np.isnan(maps["depth"][hidden]).all()
    alone = object_maps(truth == 1)
    np.testing.assert_array_equal(maps["centre"][~hidden], alone["centre"][~hidden])
    assert matched(truth, labels) == (1, 0, 0, 1.0)  # what is predicted in the crowd is no mistake
    assert matched(np.where(truth == 2, truth, 0), labels) == (0, 0, 1, 0.0)


@pytest.mark.slow_on_cpu
def test_a_run_from_annotations(roboflow, tmp_path, capsys):
    options = ["--model", "vit_tiny", "--image-size", 64, "--epochs", 1, "--repeats", 1, "--json"]
    argv = ["finetune", "--data", roboflow, "--masks", "instances", *options]
    assert cli.main([str(word) for word in [*argv, "--output", tmp_path / "run"]]) == 0
    captured = capsys.readouterr()
    assert "3 training images with 6 objects and 1 validation images with 2" in captured.err
    assert 0 <= json.loads(captured.out)["val_ap50"] <= 1
    argv = ["evaluate", "--adapter", tmp_path / "run", "--data", roboflow / "test", "--json"]
    assert cli.main([str(word) for word in argv]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1


@pytest.mark.parametrize(
    ("remove", "change", "sentence"),
    [
        ("valid", None, "but no annotations for val"),
        (None, lambda c: c["annotations"][0].update(image_id=77), "77"),
        (None, lambda c: c["images"][0].update(file_name="../../x.png"), "../../x.png"),
        (None, lambda c: c["annotations"].clear(), "an object"),
        (
            None,
            lambda c: c["images"][1].update(file_name="more/0.png"),
            "two images with the stem 0",
        ),
    ],
    ids=["part", "image", "path", "none", "stems"],
)
def test_folders_that_cannot_be(roboflow, tmp_path, remove, change, sentence, capsys):
    import shutil

    if remove:
        shutil.rmtree(roboflow / remove)
    write_images(roboflow / "train" / "more", (0,))
    path = roboflow / "train" / ROBOFLOW
    content = json.loads(path.read_text())
    if change:
        change(content)
    path.write_text(json.dumps(content))
    argv = ["finetune", "--data", roboflow, "--masks", "instances", "--model", "vit_tiny"]
    words = [*argv, "--image-size", 32, "--output", tmp_path / "run"]
    assert cli.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_annotations_where_masks_are_wanted(roboflow, tmp_path, capsys):
    for more in ([], ["--classes", "3"]):
        words = ["finetune", "--data", roboflow, "--output", tmp_path / "run", *more]
        assert cli.main([str(word) for word in words]) == 2
        assert "train on their objects with --masks instances" in capsys.readouterr().err


@pytest.mark.slow_on_cpu
def test_prompted_objects_are_the_annotations_objects(roboflow, tmp_path, capsys):
    """Overlapping ones whole, which a label image could not hold."""
    path = roboflow / "train" / ROBOFLOW
    content = annotations((0, 1, 2))
    whole = {"size": [*SIZE], "counts": [0, SIZE[0] * SIZE[1]]}
    content["annotations"][0]["segmentation"] = whole
    path.write_text(json.dumps(content))
    settings = FinetuneSettings(data=roboflow, masks="instances", prompt="box", objects=8)
    goal = PromptedObjects(settings)
    assert [pair.stem for pair in goal.split.train] == ["0", "1", "2"]
    objects = read_objects(goal.split.train[0].mask)
    assert objects.areas.tolist() == [SIZE[0] * SIZE[1], (labels_of(0) == 2).sum()]
    options = ["--model", "vit_tiny", "--image-size", 64, "--epochs", 1, "--repeats", 1, "--json"]
    argv = ["finetune", "--data", roboflow, "--masks", "instances", "--prompt", "box", *options]
    argv += ["--augment", "light", "--output", tmp_path / "run"]
    assert cli.main([str(word) for word in argv]) == 0
    assert "6 objects in 3 training and 2 objects in 1" in capsys.readouterr().err
    for more, sentence in ((["--augment", "strong"], "light"), (["--mask-suffix", "_m"], "COCO")):
        assert cli.main([str(word) for word in [*argv, *more, "--overwrite"]]) == 2
        assert sentence in capsys.readouterr().err
