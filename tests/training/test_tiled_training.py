# SPDX-License-Identifier: Apache-2.0
"""Training on tiles: what is cut, what counts as an image, and scores of whole images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from samfast import cli
from samfast.training.chosen_tasks import INSTANCES
from samfast.training.decoded import Decoded
from samfast.training.goals import goal_of
from samfast.training.instances import Instances
from samfast.training.object_maps import object_maps
from samfast.training.one_mask import OneMask
from samfast.training.settings import FinetuneSettings
from samfast.training.task_data import truth_of
from samfast.training.task_files import read_stored
from samfast.training.tasks import TaskSpec
from samfast.training.tiles import chosen_tiles, count_of, starts

SIDE = 64
SIZES = ((150, 100), (70, 40), (96, 160), (160, 64))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Images of several sizes with numbered squares, noisy enough to be mistaken."""
    folder = tmp_path_factory.mktemp("scenes")
    draw = np.random.default_rng(0)
    for part, numbers in (("train", (0, 1)), ("val", (2, 3))):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True)
        for i in numbers:
            labels = np.zeros(SIZES[i], np.uint16)
            for n, (y, x) in enumerate(np.ndindex(SIZES[i][0] // 24, 2), start=1):
                labels[24 * y + 3 : 24 * y + 17, 22 * x + 3 : 22 * x + 17] = n
            grey = draw.integers(0, 105, labels.shape) + 98 * (labels > 0)
            image = np.stack([grey, grey // 2, 200 - grey], 2).astype(np.uint8)
            Image.fromarray(image).save(folder / part / "images" / f"s{i}.png")
            Image.fromarray(labels).save(folder / part / "masks" / f"s{i}.tif")
    return folder


def goal_for(folder, decoded, **options):
    settings = {"tile": 48, "overlap": 12, "foreground": ("any",), "loss": "bce-dice"}
    settings = FinetuneSettings(data=folder, model="vit_tiny", **settings | options)
    specs = INSTANCES if settings.masks == "instances" else None
    goal = goal_of(settings, specs)
    goal.decoded = Decoded(decoded)
    goal.check()
    return goal


def instances_of(folder, decoded, **options):
    return goal_for(folder, decoded, masks="instances", foreground=None, loss=None, **options)


def pixels(folder, i):
    part = "train" if i < 2 else "val"
    image = np.asarray(Image.open(folder / part / "images" / f"s{i}.png"))
    return image, np.asarray(Image.open(folder / part / "masks" / f"s{i}.tif"))


def test_each_tile_is_an_image_of_its_own_pixels(scenes, tmp_path):
    goal = goal_for(scenes, tmp_path, flips=False)
    views = goal.views("train")
    assert len(views) == sum(count_of(SIZES[i], 48, 12) for i in (0, 1)) == goal.steady()
    data, _ = goal.training_data(48)
    assert len(data) == len(views) and goal.counts([0, 1]) == [2]
    names = set()
    for view, sample in zip(views, map(data.__getitem__, range(len(data))), strict=True):
        image, labels = pixels(scenes, int(view.item.stem[1:]))
        own = np.s_[view.tile.top : view.tile.bottom, view.tile.left : view.tile.right]
        if image[own].shape[:2] == (48, 48):  # as large as the model's images
            np.testing.assert_array_equal(sample.image, image[own])
        np.testing.assert_array_equal(sample.truth, labels[own] > 0)
        names.add(sample.name)
    assert len(names) == len(views) and {v.stem for v in views} >= {"s0 at 0,0", "s1 at 0,0"}
    assert {item.stem for item in goal.split.train} == {"s0", "s1"}


def test_a_file_is_decoded_once(scenes, tmp_path, monkeypatch):
    goal = goal_for(scenes, tmp_path)
    data, _ = goal.training_data(48)
    before = [data[0, 0], data[0, 1]]
    for name in ("read_image", "read_mask"):
        monkeypatch.setattr(f"samfast.training.tiled_data.{name}", lambda *_: 1 / 0)
    for number, sample in enumerate(before):
        np.testing.assert_array_equal(data[0, number].image, sample.image)


def test_few_files_are_kept_where_they_pass_by(tmp_path):
    decoded = Decoded(tmp_path, most=2)
    for name in "abca":
        made = decoded.array(name, "image", lambda: np.full((2, 3), ord(name), np.uint8))  # noqa: B023
        assert (made == ord(name)).all() and len(list(tmp_path.iterdir())) <= 2
    assert decoded.array("a", "image", lambda: 1 / 0).shape == (2, 3)


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5})
    monkeypatch.setattr("samfast.training.decoded.shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        ValueError, match=r"no room for the decoded images of tiles.* 0\.0 MiB are free"
    ):
        Decoded(tmp_path).array("a", "image", lambda: np.zeros(6, np.uint8))


@pytest.mark.parametrize("changes", [{"flips": True}, {"flips": False, "augment": "strong"}])
def test_tiles_of_objects_have_their_own_maps(scenes, tmp_path, changes):
    """An object that a border cuts is an object of each tile."""
    goal = instances_of(scenes, tmp_path, **changes)
    data, collate = goal.training_data(SIDE)
    batch = collate([data[i, 3] for i in range(4)])
    assert batch.targets["foreground"].shape == (4, SIDE, SIDE)
    plain = instances_of(scenes, tmp_path, flips=False).training_data(48)[0]
    for view, sample in zip(plain.items, map(plain.__getitem__, range(4)), strict=False):
        labels = view.tile.of(pixels(scenes, 0)[1])
        if labels.shape == (48, 48):
            np.testing.assert_array_equal(sample.targets["depth"][0], object_maps(labels)["depth"])


def test_empty_tiles_are_left_out_if_asked(scenes, tmp_path):
    """A background of one colour matters, so that it is trained on unless told otherwise."""
    goal = goal_for(scenes, tmp_path, tile=16, overlap=0)
    filled = goal_for(scenes, tmp_path, tile=16, overlap=0, empty_tiles=False)
    of_objects = instances_of(scenes, tmp_path, tile=16, overlap=0, empty_tiles=False)
    content = [
        bool(v.tile.of(pixels(scenes, int(v.item.stem[1]))[1]).any()) for v in goal.views("train")
    ]
    assert 0 < sum(content) < len(content)
    assert len(filled.views("train")) == sum(content) == len(of_objects.views("train"))
    assert filled.views("val") == goal.views("val")
    assert f"({len(content) - sum(content)} empty ones among them)" in list(goal.sentences())[-1]
    assert "left out" in list(filled.sentences())[-1]


class Pointwise(torch.nn.Module):
    """In place of a model: what it says of a pixel is of that pixel alone."""

    def __init__(self, specs=()):
        super().__init__()
        self.sam = torch.nn.Conv2d(1, 1, 1)  # its parameters say the device
        self.specs = specs

    def forward(self, images, sizes, rows=None, names=()):
        grey = images.float()[:, 0] - 100
        if not self.specs:
            return grey, torch.ones_like(grey, dtype=torch.bool)
        found = {"foreground": grey, "centre": grey / 100 + 0.7, "depth": grey / 100 + 0.6}
        return {name: values[rows[name], None] for name, values in found.items()}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_whole_images(scenes, tmp_path, batch_size):
    """A model that looks at pixels says the same of tiles; 64 pixels hold each without resizing."""
    whole = OneMask(
        FinetuneSettings(data=scenes, foreground=("any",), loss="bce-dice"), only_score=True
    )
    whole.check()
    goal = goal_for(scenes, tmp_path, tile=SIDE, overlap=20)
    assert goal.baseline == whole.baseline
    expected = whole.scores(Pointwise(), whole.validation_loader(whole.split.val, 160, 1))
    told = []
    loader = goal.validation_loader(goal.split.val, SIDE, batch_size)
    found = goal.scores(Pointwise(), loader, told.append)
    assert sum(told) == len(goal.views("val")) == len(loader.dataset)
    for name in ("val_dice", "val_iou"):
        assert found.row[name] == expected.row[name] < 1
    assert found.images == expected.images


def test_scores_of_objects_are_those_of_whole_images(scenes, tmp_path):
    settings = FinetuneSettings(data=scenes, masks="instances")
    whole = Instances(settings, INSTANCES, only_score=True)
    whole.check()
    goal = instances_of(scenes, tmp_path, tile=SIDE, overlap=20)
    for name, scores in goal.baseline.items():
        assert scores == pytest.approx(whole.baseline[name]), name
    model = Pointwise(INSTANCES)
    expected = whole.scores(model, whole.validation_loader(whole.split.val, 160, 1))
    found = goal.scores(model, goal.validation_loader(goal.split.val, SIDE, 3))
    for name in goal.columns[1:]:
        assert found.row[name] == pytest.approx(expected.row[name], rel=1e-5), name
    assert found.row["val_ap50"] > 0
    key = lambda row: (row["image"], row["task"])  # noqa: E731
    for mine, theirs in zip(
        sorted(found.images, key=key), sorted(expected.images, key=key), strict=True
    ):
        assert key(mine) == key(theirs)
        numbers = [
            {k: v for k, v in r.items() if k not in ("image", "task")} for r in (mine, theirs)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        TaskSpec("a", "semantic", 9),
        TaskSpec("a", "regression", scale=2.0, offset=1.0),
        TaskSpec("a", derive="boundary"),
        TaskSpec("a", "regression", derive="distance"),
        *INSTANCES,
    ],
    ids=lambda spec: spec.derive or spec.kind,
)
def test_lines_of_a_truth_are_those_of_the_whole(scenes, tmp_path, spec):
    goal = instances_of(scenes, tmp_path)
    item = goal.split.val[0]
    item = type(item)(item.stem, item.image, {spec.name: next(iter(item.targets.values()))})
    whole = truth_of(spec, read_stored(spec, item.targets[spec.name]))
    found = [goal.arrays.truth_lines(item, spec, lines) for lines in (np.s_[:40], np.s_[40:96])]
    np.testing.assert_array_equal(np.concatenate(found, -2), whole)


def test_tiles_that_are_kept_and_told():
    assert chosen_tiles(None, None, (96, 7)) == (96, 7)
    assert chosen_tiles(None, 9, (96, 7)) == (96, 9)
    assert chosen_tiles(64, None, (96, 7)) == (64, 16)
    assert chosen_tiles(0, None, (96, 7)) is None is chosen_tiles(None, None)
    assert starts(96, 96, 7) == [0]


def run(capsys, *argv):
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    return code, capsys.readouterr()


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    options = ["--masks", "instances", "--model", "vit_tiny", "--image-size", SIDE, "--repeats", 1]
    options += ["--epochs", 1, "--tile", 48, "--overlap", 12, "--augment", "light", "--workers", 1]
    argv = ["finetune", "--data", scenes, *options, "--output", output]
    assert cli.main([str(word) for word in argv]) == 0
    return output


@pytest.mark.slow_on_cpu
def test_a_run_counts_tiles_and_leaves_no_decoded_file(scenes, trained):
    summary = json.loads((trained / "summary.json").read_text())
    tiles = sum(count_of(SIZES[i], 48, 12) for i in (0, 1))
    assert summary["steps"] == -(-tiles // 2)
    settings = json.loads((trained / "settings.json").read_text())
    assert settings["train"] == ["s0", "s1"] and settings["tile"] == 48
    assert not [path for path in trained.iterdir() if "decoded" in path.name]
    panel = Image.open(trained / "overlays" / "s2.png")
    assert panel.width > 3 * 160


@pytest.mark.slow_on_cpu
def test_prediction_and_scores_take_the_tiles_of_the_run(scenes, trained, tmp_path, capsys):
    base = ["evaluate", "--data", scenes, "--adapter", trained]
    code, said = run(capsys, *base)
    assert code == 0 and "tiles of 48 pixels, overlapping by 12, as in training" in said.out
    code, said = run(capsys, *base, "--json")
    scored = json.loads(said.out)
    summary = json.loads((trained / "summary.json").read_text())
    assert (scored["tile"], scored["overlap"]) == (48, 12)
    assert scored["val_ap50"] == pytest.approx(summary["val_ap50"])
    for name, scores in scored["tasks"].items():
        assert scores == pytest.approx(summary["tasks"][name], rel=1e-4)
    code, said = run(capsys, *base, "--json", "--tile", 0)
    other = json.loads(said.out)
    assert "tile" not in other and other["tasks"]["depth"] != pytest.approx(
        scored["tasks"]["depth"]
    )
    image = scenes / "val/images/s2.png"
    base = ["predict", image, "--adapter", trained, "--output", tmp_path, "--probabilities"]
    found = []
    for options in ([], ["--tile", 48, "--overlap", 12], ["--tile", 0]):
        code, said = run(capsys, *base, *options)
        assert code == 0 and ("as in training" in said.out) == (not options)
        labels = np.asarray(Image.open(tmp_path / "s2_labels.tif"))
        (chances,) = tmp_path.glob("s2*probabilit*")
        found.append((labels, np.asarray(Image.open(chances))))
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0][1] != found[2][1]).any()  # one epoch may find no object either way


@pytest.mark.slow_on_cpu
def test_a_run_of_tiles_goes_on(scenes, tmp_path, capsys):
    options = ["--foreground", "any", "--model", "vit_tiny", "--image-size", SIDE, "--repeats", 1]
    base = ["finetune", "--data", scenes, *options, "--output", tmp_path / "run"]
    assert run(capsys, *base, "--tile", 64, "--epochs", 1)[0] == 0
    code, said = run(capsys, *base, "--tile", 48, "--epochs", 2, "--resume")
    assert code == 2 and "tile was 64 and is 48" in said.err
    assert run(capsys, *base, "--tile", 64, "--epochs", 2, "--resume")[0] == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tile", "8"], "tile is 8; it must be at least 16, or 0 for whole images"),
        (["--overlap", "4"], "overlap is 4, but only tiles overlap; give --tile"),
        (["--tile", "64", "--overlap", "33"], "of tiles of 64 it is at most 32"),
        (["--no-empty-tiles"], "empty_tiles is off, but there are no tiles; give --tile"),
        (["--tile", "64", "--prompt", "box"], "prompts need whole images; leave out one of them"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(scenes, refused, options, sentence):
    refused("finetune", "--data", scenes, "--model", "vit_tiny", *options, pattern=sentence)
