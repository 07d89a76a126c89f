# SPDX-License-Identifier: Apache-2.0
"""The rules of a data folder, each broken once, and the split."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from samfast.training.data import PairDataset
from samfast.training.folders import load_split
from samfast.training.foreground import Above, chosen_foreground, foreground_config
from samfast.training.one_mask import OneMask
from samfast.training.settings import FinetuneSettings


def save(path, values, dtype=np.uint8):
    Image.fromarray(np.asarray(values, dtype)).save(path)


def values_mask(folder, stem, *values):
    """Replace a mask by vertical stripes of these values, at its old size."""
    path = folder / "masks" / f"{stem}.png"
    width, height = Image.open(path).size
    stripes = np.resize(np.repeat(values, -(-width // len(values))), width)
    save(path, np.broadcast_to(stripes, (height, width)))


def test_a_sound_folder_is_split_by_seed(data):
    split = load_split(data, seed=1)
    assert (len(split.train), len(split.val)) == (5, 1)
    stems = sorted(p.stem for p in (*split.train, *split.val))
    assert stems == [f"p{i}" for i in range(6)]
    assert split == load_split(data, seed=1)
    assert len({load_split(data, seed=s).val for s in range(20)}) > 2
    half = load_split(data, val_fraction=0.5)
    assert (len(half.train), len(half.val)) == (3, 3)
    assert not set(half.train) & set(half.val)
    for fraction, count in ((0.01, 1), (0.99, 5)):
        assert len(load_split(data, val_fraction=fraction).val) == count
    with pytest.raises(ValueError, match=r"val_fraction is 1\.0"):
        load_split(data, val_fraction=1.0)


def test_train_and_val_folders_are_honoured(data, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(data, both / "train")
    with pytest.raises(FileNotFoundError, match=r"has train/ but no val/"):
        load_split(both)
    shutil.copytree(data, both / "val")
    (both / "val" / "images" / "p0.png").unlink()
    (both / "val" / "masks" / "p0.png").unlink()
    split = load_split(both)
    assert (len(split.train), len(split.val)) == (6, 5)
    assert {p.image.parts[-3] for p in split.val} == {"val"}
    (both / "images").mkdir()
    with pytest.raises(ValueError, match=r"has both images/ and train/"):
        load_split(both)


def test_missing_folders(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_split(tmp_path / "nowhere")
    for kind in ("masks", "images"):
        shutil.move(data / kind, tmp_path / kind)
        with pytest.raises(FileNotFoundError, match=f"has no folder {kind}/"):
            load_split(data)
        shutil.move(tmp_path / kind, data / kind)


def test_files_need_a_folder(tmp_path):
    assert FinetuneSettings(data=tmp_path).folder == tmp_path
    with pytest.raises(ValueError, match="expected a folder of images and masks, got none"):
        OneMask(FinetuneSettings())


def test_unpaired_files(data):
    (data / "masks" / "p2.png").rename(data / "masks" / "q.png")
    with pytest.raises(ValueError, match=r"image .*p2\.png has no mask"):
        load_split(data)
    (data / "images" / "p2.png").unlink()
    with pytest.raises(ValueError, match=r"mask .*q\.png has no image"):
        load_split(data)


def test_two_files_of_one_stem(data):
    Image.open(data / "images" / "p1.png").save(data / "images" / "p1.bmp")
    with pytest.raises(ValueError, match=r"two files with the stem p1: p1\.bmp and p1\.png"):
        load_split(data)


def test_foreign_files_and_folders(data):
    (data / "images" / ".hidden").touch()
    (data / "masks" / "Thumbs.db").touch()
    load_split(data)
    (data / "images" / "deeper").mkdir()
    with pytest.raises(ValueError, match=r"contains the folder deeper/"):
        load_split(data)
    (data / "images" / "deeper").rmdir()
    (data / "images" / "photo.heic").touch()
    with pytest.raises(ValueError, match=r"photo\.heic is not a \.png"):
        load_split(data)


def test_empty_and_single(data):
    for kind in ("images", "masks"):
        for i in range(1, 6):
            (data / kind / f"p{i}.png").unlink()
    with pytest.raises(ValueError, match="holds 1 image; training and validation need at least 2"):
        load_split(data)
    for kind in ("images", "masks"):
        (data / kind / "p0.png").unlink()
    with pytest.raises(ValueError, match="has no images"):
        load_split(data)


def test_suffixes_may_differ_in_kind_and_case(data):
    image = Image.open(data / "images" / "p3.png")
    image.save(data / "images" / "p3.JPG", "JPEG")
    (data / "images" / "p3.png").unlink()
    load_split(data)


def test_mask_of_another_size_also_after_rotation(data):
    save(data / "masks" / "p4.png", np.zeros((10, 12)))
    with pytest.raises(ValueError, match=r"p4\.png is 12x10 .*p4\.png is 64x64"):
        load_split(data)
    width, height = Image.open(data / "images" / "p0.png").size
    save(data / "masks" / "p4.png", np.zeros((64, 64)))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    mask = Image.open(data / "masks" / "p0.png")
    mask.save(data / "masks" / "p0.png", exif=exif)
    with pytest.raises(ValueError, match=rf"p0\.png is {height}x{width} .*is {width}x{height}"):
        load_split(data)
    image = Image.open(data / "images" / "p0.png")
    image.save(data / "images" / "p0.png", exif=exif)
    load_split(data)


def test_damaged_files_are_found_before_training(data):
    path = data / "images" / "p5.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"p5\.png cannot be decoded"):
        load_split(data)


def test_more_than_two_values_name_the_first_few(data):
    values_mask(data, "p1", 0, 1, 2, 3, 4, 5, 6)
    with pytest.raises(ValueError, match=r"p1\.png holds 7 values \(0, 1, 2, 3, 4, …\)"):
        load_split(data)
    load_split(data, foreground=(2, 255))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_ways_out_that_the_sentence_names(data, dtype):
    top = np.iinfo(dtype).max
    for i in range(6):  # numbers of instances, others in every file
        image = Image.open(data / "masks" / f"p{i}.png")
        ids = np.asarray(image, np.int64) // 255 * (top - 7 * i)
        ids[:3, :5] = 3 * i + 1
        save(data / "masks" / f"p{i}.png", ids, dtype)
    with pytest.raises(ValueError) as error:
        load_split(data)
    for way in ("--foreground any", "--threshold T", "--foreground VALUES"):
        assert way in str(error.value)
    split = load_split(data, foreground="any")
    above = load_split(data, foreground=Above(100.0))
    few = load_split(data, foreground=(1, 4))
    assert split == above == few == load_split(data, foreground=("any",))
    for rule, counted in (("any", lambda v: v > 0), (Above(100.0), lambda v: v > 100)):
        for pair in split.train:
            truth = PairDataset((pair,), 64, foreground=rule)[0].truth
            assert np.array_equal(truth, counted(np.asarray(Image.open(pair.mask))))


def test_rules_of_foreground():
    assert chosen_foreground() is None
    assert chosen_foreground((1, 2)) == (1, 2)
    assert chosen_foreground(["any"]) == chosen_foreground("any") == Above(0.0, any=True)
    assert chosen_foreground(None, 3) == Above(3.0)
    assert foreground_config(Above(0.0, any=True)) == {"foreground": ["any"], "threshold": None}
    for rule in (None, (1, 2), Above(0.0, any=True), Above(2.5)):
        assert chosen_foreground(*foreground_config(rule).values()) == rule
    with pytest.raises(ValueError, match="foreground is any, 3; any must be the only value"):
        chosen_foreground(("any", 3))
    with pytest.raises(ValueError, match="threshold is 3, but foreground is given too"):
        chosen_foreground((1,), 3)


def split_in_two(data, folder, part: str, value: int):
    """train/ and val/, the masks of one part set to a value."""
    for name in ("train", "val"):
        shutil.copytree(data, folder / name)
    for path in (folder / part / "masks").iterdir():
        save(path, np.full(np.asarray(Image.open(path)).shape, value))
    return folder


@pytest.mark.parametrize(
    "part,pattern",
    [
        ("val", "none of the validation masks has a foreground pixel, so that every score is 1"),
        (
            "train",
            "none of the training masks has a foreground pixel, so that the model has nothing",
        ),
    ],
)
def test_a_part_without_any_object_is_refused(data, tmp_path, part, pattern):
    folder = split_in_two(data, tmp_path / "both", part, 0)
    for foreground in (None, ("any",), (255,)):
        settings = FinetuneSettings(data=folder, model="vit_tiny", foreground=foreground)
        with pytest.raises(ValueError, match=pattern):
            OneMask(settings).check()
    values_mask(folder / part, "p3", 0, 255)  # one object is enough
    OneMask(settings).check()


def test_a_value_that_validation_lacks_is_said(data, tmp_path):
    folder = split_in_two(data, tmp_path / "both", "val", 255)
    values_mask(folder / "train", "p0", 0, 7, 255)
    values_mask(folder / "train", "p1", 0, 8, 255)
    for foreground, expected in (
        ((7, 255), "foreground value 7 occurs in training masks but in no validation mask"),
        ((7, 8, 255), "foreground value 7, 8 occur in training masks but in no validation mask"),
        ((255,), None),
        (("any",), None),
    ):
        goal = OneMask(FinetuneSettings(data=folder, model="vit_tiny", foreground=foreground))
        goal.check()
        first = next(iter(goal.sentences()))
        assert first.startswith(expected or "6 training and 6 validation images")


def test_an_object_left_in_a_few_grey_values_is_said(data):
    rng = np.random.default_rng(0)
    for i in range(6):
        mask = np.asarray(Image.open(data / "masks" / f"p{i}.png")) > 0
        dark = np.where(
            mask, rng.integers(100, 160, mask.shape), rng.integers(0, 60000, mask.shape)
        )
        (data / "images" / f"p{i}.png").unlink()
        values = dark if i < 2 else rng.integers(0, 60000, mask.shape)
        save(data / "images" / f"p{i}.tif", values, np.uint16)
    settings = FinetuneSettings(data=data, model="vit_tiny")
    goal = OneMask(settings)
    goal.check()
    assert re.match(
        r"--range auto leaves few grey values in objects \(1 in .*p[01]\.tif\) in 2 of 6 images; "
        r"--range full or --range LOW,HIGH may keep more",
        next(iter(goal.sentences())),
    )
    goal = OneMask(dataclasses.replace(settings, range="0,160"))
    goal.check()
    assert next(iter(goal.sentences())).startswith("5 training and 1 validation images")
    image = goal.training_data(64)[0][0].image
    assert len(np.unique(image)) > 60


def test_masks_that_disagree(data):
    values_mask(data, "p1", 0, 1)
    with pytest.raises(ValueError, match=r"together hold more than two values: 0, 1, 255"):
        load_split(data)


def test_two_values_without_background(data):
    for i in range(6):
        values_mask(data, f"p{i}", 1, 2)
    with pytest.raises(
        ValueError, match=r"values up to this file are 1, 2, without 0 for the background"
    ):
        load_split(data)
    split = load_split(data, foreground=(2,))
    truth = PairDataset(split.val, 64, foreground=(2,))[0].truth
    assert 0 < truth.sum() < truth.size


def test_foreground_must_occur(data):
    with pytest.raises(ValueError, match=r"foreground 7, 9 occurs in no mask.*hold 0, 255"):
        load_split(data, foreground=(7, 9))
    with pytest.raises(ValueError, match="foreground is empty"):
        load_split(data, foreground=())
    for i in range(6):
        values_mask(data, f"p{i}", 0)
    with pytest.raises(ValueError, match="has a foreground pixel"):
        load_split(data)
