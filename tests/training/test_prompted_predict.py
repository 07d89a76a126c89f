# SPDX-License-Identifier: Apache-2.0
"""Adapters of single objects: evaluation, prediction, and the prompts that do not fit."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from objects_folder import NUMBERS, discs, fill_with_objects
from PIL import Image

import samfast
from samfast import cli
from samfast.models.prompted import FirstPrompts
from samfast.training.images import read_image
from samfast.training.loop import finetune
from samfast.training.object_prompts import object_prompts
from samfast.training.predict import load_adapted
from samfast.training.prompted_data import resize_image
from samfast.training.prompted_scores import LabelMap
from samfast.training.prompted_segmenter import PromptedSegmenter
from samfast.training.settings import FinetuneSettings, PredictSettings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished run of two rounds, mixed prompts."""
    folder = tmp_path_factory.mktemp("prompted")
    data = fill_with_objects(folder / "data", 5, empty=(0,))
    settings = FinetuneSettings(
        **{"data": data, "output": folder / "out", "model": "vit_tiny", "image_size": 64},
        **{"masks": "instances", "prompt": "mixed", "prompt_rounds": 2, "val_fraction": 0.34},
        **{"epochs": 2, "repeats": 8, "lr": 2e-3, "overlays": 1, "objects": 2},
    )
    return settings, finetune(settings)


def called(capsys, *argv):
    assert cli.main([str(word) for word in (*argv, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def adapter_of(run):
    return run[0].output / "adapter" / "best"


def box_of(labels, number):
    y, x = np.nonzero(labels == number)
    return [int(v) for v in (x.min(), y.min(), x.max(), y.max())]


def test_the_adapter_remembers_and_its_table_has_the_scores(run):
    settings, summary = run
    extra = samfast.read_adapter_config(adapter_of(run))["extra"]
    own = {"masks": "instances", "prompt": "mixed", "prompt_rounds": 2, "box_jitter": 1.0}
    assert own.items() <= extra.items()
    with (settings.output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("val_miou", "val_miou_box", "val_miou_point", "val_miou_rounds")
    for row in rows:
        miou, box, point, _ = (float(row[name]) for name in names)
        assert miou == pytest.approx((box + point) / 2, rel=1e-12)
    assert summary["val_miou"] > 0.2  # 0.01 before training
    assert summary["objects"] in (2, 4) and 0.5 < summary["filled_box_miou"] < 1


def test_evaluate_gives_the_scores_of_the_run(run, tmp_path, capsys):
    settings, summary = run
    val = json.loads((settings.output / "settings.json").read_text())["val"]
    data = tmp_path / "val"
    for kind in ("images", "masks"):
        (data / kind).mkdir(parents=True)
        for stem in val:
            shutil.copy(settings.data / kind / f"{stem}.png", data / kind)
    given = ("evaluate", "--data", data, "--adapter", adapter_of(run), "--batch-size", 1)
    found = called(capsys, *given, "--output", tmp_path / "scores", "--decoder-chunk", 1)
    for name in ("val_loss", "val_miou", "val_miou_box", "val_miou_point", "val_miou_rounds"):
        assert found[name] == pytest.approx(summary[name], rel=1e-3, abs=1e-3), name
    assert [row["image"] for row in found["per_image"]] == sorted(val)
    assert (tmp_path / "scores" / "scores.csv").read_text().startswith("image,objects,miou\n")
    assert (tmp_path / "scores" / f"{val[0]}.png").is_file()


def mask_of(model, image, box=None, points=None):
    """The mask of one object by itself at 64 pixels, through the model's own rounds."""
    given = [float(v) for v in (box if box is not None else [*points[0], 0])]
    first = FirstPrompts(torch.tensor([given]), torch.tensor([box is not None]))
    more = torch.tensor([points[1:]]).float() if points is not None and len(points) > 1 else None
    with torch.no_grad():
        pixels = torch.from_numpy(resize_image(image, 64).transpose(2, 0, 1).copy())[None]
        embedding = model.embeddings(pixels, torch.tensor([[64, 64]]))
        (one,) = model.rounds(embedding, [1], first, given=more)
    return one.logits[0].numpy() > 0


def test_predicted_labels_are_those_of_each_object(run, tmp_path, capsys):
    images = [run[0].data / "images" / f"p{i}.png" for i in (1, 2, 3)]
    boxes = {f"p{i}.png": [box_of(discs(i)[1], n) for n in NUMBERS] for i in (1, 3)}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    lines = [f"{name},{','.join(map(str, box))}" for name, own in boxes.items() for box in own]
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\n" + "\n".join(lines) + "\n\n")
    given = ("predict", *images, "--adapter", adapter_of(run), "--output")
    found = called(capsys, *given, tmp_path / "a", "--boxes", tmp_path / "boxes.json")["images"]
    more = ("--batch-size", 1, "--decoder-chunk", 1)
    called(capsys, *given, tmp_path / "b", "--boxes", tmp_path / "boxes.csv", *more)
    model = PromptedSegmenter(load_adapted(adapter_of(run))).eval()
    assert [len(own["areas"]) for own in found] == [2, 0, 2]
    for path, own in zip(images, found, strict=True):
        labels = np.asarray(Image.open(own["labels"]))
        assert labels.dtype == np.uint16 and labels.shape == (64, 64)
        again = np.asarray(Image.open(tmp_path / "b" / f"{path.stem}_labels.tif"))
        assert np.array_equal(labels, again)
        assert Image.open(own["overlay"]).size == (64, 64)
        image, wanted = read_image(path), LabelMap((64, 64))
        for i, box in enumerate(boxes.get(path.name, ()), 1):
            wanted.add(mask_of(model, image, box=box), i)
        assert np.array_equal(labels, wanted.labels)
    assert any(own["areas"] != [0, 0] for own in found if own["areas"])


def test_points_with_labels_and_objects(run, tmp_path, capsys):
    image = run[0].data / "images" / "p1.png"
    (tmp_path / "points.csv").write_text("p1.png,20,20,1,4\np1.png,50,20\np1.png,30,30,0,4\n")
    given = ("predict", image, "--adapter", adapter_of(run), "--output")
    found = called(capsys, *given, tmp_path / "a", "--points", tmp_path / "points.csv")["images"][0]
    model = PromptedSegmenter(load_adapted(adapter_of(run))).eval()
    wanted = LabelMap((64, 64))
    wanted.add(mask_of(model, read_image(image), points=[[20, 20, 1], [30, 30, 0]]), 1)
    wanted.add(mask_of(model, read_image(image), points=[[50, 20, 1]]), 2)
    assert np.array_equal(np.asarray(Image.open(found["labels"])), wanted.labels)
    single = called(capsys, *given, tmp_path / "b", "--point", "20,20", "--point", "50,20")
    assert len(single["images"][0]["areas"]) == 2


BROKEN = [
    (
        "boxes.csv",
        "p1.png,1,2,3\n",
        r"boxes.csv line 1 holds '1,2,3'; expected numbers x0,y0,x1,y1",
    ),
    (
        "boxes.csv",
        "p1.png,1,2,3,4\np1.png,1,2,3,x\n",
        r"boxes.csv line 2 holds '1,2,3,x'; expected",
    ),
    ("boxes.csv", "p1.png,1,2,3,nan\n", r"line 1 holds '1,2,3,nan'; expected numbers"),
    (
        "boxes.csv",
        "q.png,1,2,3,4\n",
        r"line 1 names the image 'q.png', but that image is not predicted",
    ),
    ("boxes.csv", "p1.png,9,2,3,4\n", r"line 1 holds a box whose second corner is left of"),
    ("boxes.csv", "p1.png,1,2,3,65\n", r"line 1: box 1,2,3,65 is not inside image .*p1.png"),
    ("boxes.csv", "p1.png\n", r"boxes.csv line 1 holds 'p1.png', not image,x0,y0,x1,y1"),
    ("boxes.csv", 'p1.png,"1\n', r"boxes.csv line \d is not CSV: "),
    ("boxes.json", "{", r"boxes.json is not JSON: "),
    ("boxes.json", "[1]", r"boxes.json is not a mapping of images"),
    ("boxes.json", '{"p1.png": 3}', r"has no list of \[x0,y0,x1,y1\] for image 'p1.png'"),
    ("boxes.json", '{"p1.png": [[1,2,3,"4"]]}', r"image 'p1.png' row 1 holds .*; expected numbers"),
    ("boxes.json", '{"p1.png": [[1,2,3,true]]}', r"row 1 holds '1,2,3,True'; expected numbers"),
    ("boxes.json", "[" * 100_000, r"boxes.json is not JSON: "),
    ("boxes.txt", "", r"boxes.txt is neither a .csv nor a .json file"),
    ("points.csv", "p1.png,1,2,7\n", r"points.csv line 1 has label 7; it must be 1"),
    ("points.csv", "p1.png,1,2,1,1,1\n", r"line 1 holds '1,2,1,1,1'; expected numbers x,y\[,label"),
    ("points.csv", "p1.png,65,2\n", r"line 1: point 65,2 is not inside image .*p1.png"),
]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "p1.png"
    Image.fromarray(discs(1)[0]).save(path)
    return path


@pytest.mark.parametrize(("name", "text", "pattern"), BROKEN)
def test_a_broken_line_is_one_sentence(image, tmp_path, name, text, pattern):
    (tmp_path / name).write_text(text)
    option = {name.partition(".")[0]: tmp_path / name}
    settings = PredictSettings(images=(image,), adapter=tmp_path / "a", **option)
    with pytest.raises(ValueError, match=pattern) as error:
        object_prompts(settings, ("box", "point"), {image: (64, 64)})
    assert "\n" not in str(error.value)


def test_prompts_that_fit_neither_adapter_nor_images(image, tmp_path):
    def refused(pattern, kinds=("box",), sizes=None, kind=ValueError, **options):
        settings = PredictSettings(images=(image,), adapter=tmp_path / "a", **options)
        with pytest.raises(kind, match=pattern):
            object_prompts(settings, kinds, sizes or {image: (64, 64)})

    refused("a prompt for each object, but no prompt is given; give --boxes FILE or --box")
    refused("trained with a box for each object; leave out --points", points=tmp_path / "p.csv")
    refused("trained with a point for each object; leave out --box", ("point",), box=("1,2,3,4",))
    both = {"box": ("1,2,3,4",), "point": ("1,2",)}
    refused("but --box and --point are given; give one of --boxes FILE", ("box", "point"), **both)
    refused("does not exist", boxes=tmp_path / "none.csv", kind=FileNotFoundError)
    refused("is not a regular file", boxes=tmp_path)
    other = image.with_name("q") / "p1.png"
    sizes = {image: (64, 64), other: (64, 64), tmp_path / "z.png": (64, 64)}
    refused("got 2 boxes for 3 images; give one for all, or one", sizes=sizes, box=("1,2,3,4",) * 2)
    (tmp_path / "boxes.csv").write_text("p1.png,1,2,3,4\n")
    refused(
        "line 1 names the image 'p1.png', but two images", sizes=sizes, boxes=tmp_path / "boxes.csv"
    )
    (tmp_path / "boxes.csv").write_bytes(b"\xff\xfe\x00")
    refused("is not text in UTF-8", boxes=tmp_path / "boxes.csv")


def test_the_command_line_refuses_before_it_writes(run, refused, tmp_path):
    image = run[0].data / "images" / "p1.png"
    one = ("predict", image, "--adapter", adapter_of(run))
    refused(
        *one, pattern="trained with a prompt for each object, but no prompt is given; give --boxes"
    )
    refused(*one, "--box", "1,2,3,99", pattern="box 1,2,3,99 is not inside image .*p1.png")
    (tmp_path / "b.csv").write_text("p1.png,1,2,3,4\np1.png,1\n")
    refused(*one, "--boxes", tmp_path / "b.csv", pattern="b.csv line 2 holds '1'; expected numbers")


def test_the_smaller_of_two_masks_is_on_top():
    large, small = np.zeros((2, 4, 4), bool)
    large[:3], small[1:] = True, False
    small[1, 1:3] = True
    for order in ((0, 1), (1, 0)):
        found = LabelMap((4, 4))
        for i in order:
            assert found.add((large, small)[i], i + 1) == (12, 2)[i]
        assert found.labels.tolist() == [[1] * 4, [1, 2, 2, 1], [1] * 4, [0] * 4]
