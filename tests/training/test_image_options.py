# SPDX-License-Identifier: Apache-2.0
"""Options about files, from fine-tuning to evaluation and prediction, and in tasks.yaml."""

import json

import numpy as np
import pytest
import tifffile
from conftest import rectangle
from PIL import Image

from samfast import cli
from samfast.modules.adapter_files import read_adapter_config
from samfast.training.image_options import ImageOptions, image_options, remembered_options
from samfast.training.many_tasks import ManyTasks
from samfast.training.settings import FinetuneSettings
from samfast.training.tasks import parsed, specs_from_config


@pytest.fixture
def bands(tmp_path):
    """Four bands of 12 bits without a word on their colours, and masks of instance numbers."""
    folder = tmp_path / "bands"
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True)
    for i in range(4):
        image, mask = rectangle(i, 48, 64)
        values = np.dstack([image, 255 - image[..., 0]]).astype(np.uint16) * 16
        place = folder / ("val" if i == 3 else "train")
        tifffile.imwrite(
            place / f"images/p{i}.tif", values, photometric="minisblack", planarconfig="contig"
        )
        numbers = mask.astype(np.uint16) * (500 + i)
        numbers[:2, :2] = 1
        Image.fromarray(numbers).save(place / f"masks/p{i}.png")
    return folder


@pytest.mark.slow_on_cpu
def test_options_of_images_travel_with_the_adapter(bands, tmp_path, capsys):
    def run(*arguments) -> str:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    tune = ["finetune", "--data", bands, "--model", "vit_tiny", "--image-size", "64"]
    tune += ["--method", "decoder", "--epochs", "1", "--repeats", "1", "--overlays", "1"]
    for refused, pattern in (([], "name three with --bands 1,2,3"), (["--bands", "1,2,3"], "any")):
        assert cli.main([*map(str, tune), *refused]) == 2
        assert pattern in capsys.readouterr().err
    output = tmp_path / "out"
    options = ["--bands", "3,2,4", "--range", "0,4095"]
    run(*tune, *options, "--foreground", "any", "--output", output)
    extra = read_adapter_config(output / "adapter" / "best")["extra"]
    assert (extra["bands"], extra["range"]) == ("3,2,4", "0.0,4095.0")
    assert (extra["foreground"], extra["threshold"]) == (["any"], None)
    saved = json.loads((output / "settings.json").read_text())
    assert (saved["bands"], saved["range"]) == ("3,2,4", "0,4095")

    adapter, photo = ("--adapter", output / "adapter" / "best"), bands / "val/images/p3.tif"
    scores = json.loads(run("evaluate", *adapter, "--data", bands, "--json"))
    summary = json.loads((output / "summary.json").read_text())
    assert scores["val_dice"] == summary["val_dice"]
    shown = {}
    for name, more in (("kept", []), ("named", options), ("others", ["--bands", "4"])):
        run("predict", *adapter, photo, *more, "--output", tmp_path / name)
        shown[name] = np.asarray(Image.open(tmp_path / name / "p3_overlay.png"))
    assert np.array_equal(shown["kept"], shown["named"])
    assert not np.array_equal(shown["kept"], shown["others"])


def test_texts_of_options():
    assert image_options() == ImageOptions(None, "auto")
    assert image_options("4, 3,2", "-5.5,100") == ImageOptions((4, 3, 2), (-5.5, 100.0))
    for options in (
        ImageOptions(),
        ImageOptions((2,), "full"),
        ImageOptions((1, 2, 3), (0.1, 2.0)),
    ):
        assert remembered_options(options.config()) == options
    assert remembered_options({}) == ImageOptions()  # of adapters that know of no options
    assert remembered_options({"bands": "1", "range": "full"}, "3,2,1", "0,9") == ImageOptions(
        (3, 2, 1), (0.0, 9.0)
    )
    with pytest.raises(ValueError, match="options hold 7; expected text"):
        remembered_options({"range": 7})
    for bands in ("", "1,2", "1,2,3,4", "a", "-1", "0"):
        with pytest.raises(ValueError, match="expected one or three numbers from 1"):
            image_options(bands)
    for reach in ("none", "3", "5,5", "1,2,3", "nan,1", "0,inf"):
        with pytest.raises(ValueError, match="expected auto, full or LOW,HIGH"):
            image_options(None, reach)


def task(**keys) -> dict:
    return {"tasks": [{"name": "cells", **keys}]}


def test_tasks_name_any_and_a_threshold():
    for keys in ({"foreground": "any"}, {"foreground": ["any"]}, {"threshold": 3}):
        (spec,) = parsed(task(**keys))
        assert specs_from_config(json.loads(json.dumps([spec.config()]))) == (spec,)
        assert spec.rule.threshold == keys.get("threshold", 0)
    for keys, pattern in (
        ({"foreground": "all"}, "task cells has foreground 'all', not numbers"),
        (
            {"foreground": ["any", 2]},
            "task cells: foreground is any, 2; any must be the only value",
        ),
        ({"foreground": 1, "threshold": 3}, "task cells: threshold is 3, but foreground is given"),
        ({"threshold": 3, "kind": "regression"}, "has threshold, which only binary masks have"),
        ({"threshold": 3, "derive": "boundary"}, "has threshold, which only binary masks have"),
    ):
        with pytest.raises(ValueError, match=pattern):
            parsed(task(**keys))


def goal_of(folder, content, **options) -> ManyTasks:
    settings = FinetuneSettings(data=folder, model="vit_tiny", **options)
    goal = ManyTasks(settings, parsed(content))
    goal.check()
    return goal


def test_masks_of_tasks_by_the_same_rules(bands):
    cells, options = task(), {"bands": "1,2,3"}
    with pytest.raises(
        ValueError, match=r"task cells: mask .* say what is foreground: foreground: any"
    ):
        goal_of(bands, cells, **options)
    with pytest.raises(ValueError, match="name three with --bands 1,2,3"):
        goal_of(bands, task(foreground="any"))
    for keys, count in (({"foreground": "any"}, 336 + 4), ({"threshold": 100}, 336)):
        goal = goal_of(bands, task(**keys), **options)
        sample = goal.training_data(64)[0][0]
        assert int((sample.truths["cells"] == 1).sum()) == count
        assert goal.remembered()["bands"] == "1,2,3"
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(bands / "val/masks/p3.png")
    with pytest.raises(ValueError, match="none of the validation masks of task cells has a foreg"):
        goal_of(bands, task(foreground="any"), **options)
    for part, value in (("val", 1), ("train", 0)):
        for path in (bands / part / "masks").iterdir():
            Image.fromarray(np.full((48, 64), value, np.uint8)).save(path)
    with pytest.raises(ValueError, match="none of the training masks of task cells has a foregro"):
        goal_of(bands, task(foreground="any"), **options)


def test_classes_that_validation_lacks_and_classes_of_lossy_masks(bands):
    for part, numbers in (("train", range(3)), ("val", (3,))):
        for i in numbers:
            classes = np.zeros((48, 64), np.uint8)
            classes[:9], classes[9:12] = 1, 2 * (part == "train")
            Image.fromarray(classes).save(bands / part / f"masks/p{i}.png")
    content = task(kind="semantic", channels=4)
    Image.fromarray(classes).save(bands / "val/masks/p3.png")
    goal = goal_of(bands, content, bands="1")
    expected = "task cells: class 2 occurs in training masks but in no validation mask, so"
    assert next(iter(goal.sentences())).startswith(expected)
    (bands / "val/masks/p3.png").unlink()
    Image.fromarray(classes).save(bands / "val/masks/p3.jpg", quality=95)
    with pytest.raises(ValueError, match=r"p3\.jpg uses lossy compression, which changes"):
        goal_of(bands, content, bands="1")
