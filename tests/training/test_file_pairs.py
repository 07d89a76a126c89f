# SPDX-License-Identifier: Apache-2.0
"""Masks that are called as their images with a text after the stem."""

import json
import shutil

import pytest

from samfast import cli
from samfast.training.checks import check_settings
from samfast.training.dataset_goal import check_of_dataset
from samfast.training.file_pairs import find_pairs
from samfast.training.folders import find_scored, find_split
from samfast.training.one_mask import OneMask
from samfast.training.settings import FinetuneSettings

TINY = ("--model", "vit_tiny", "--image-size", 64, "--mask-suffix", "_mask")
TINY += ("--epochs", 1, "--repeats", 1)


def suffixed(data, where="masks", at="images"):
    """The masks renamed to p0_mask.png and so on, moved to a folder; the images too."""
    for kind, to, end in (("masks", where, "_mask"), ("images", at, "")):
        for path in sorted((data / kind).iterdir()):
            (data / to).mkdir(exist_ok=True)
            path.rename(data / to / f"{path.stem}{end}{path.suffix}")
        if kind not in (where, at):
            (data / kind).rmdir()
    return data


@pytest.mark.parametrize("where, at", [("masks", "images"), ("images", "images"), (".", ".")])
def test_masks_are_found_by_their_names(data, where, at):
    suffixed(data, where, at)
    pairs = find_pairs(data, "_mask")
    assert [pair.stem for pair in pairs] == [f"p{i}" for i in range(6)]
    for pair in pairs:
        assert pair.image == data / at / f"{pair.stem}.png"
        assert pair.mask == data / where / f"{pair.stem}_mask.png"
    goal = OneMask(FinetuneSettings(data=data, mask_suffix="_mask"))
    goal.check()
    assert sorted((*goal.split.train, *goal.split.val), key=lambda p: p.stem) == list(pairs)
    assert find_scored(data, "_mask") == pairs


def test_each_part_of_a_split_folder(data, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    shutil.copytree(data, both / "val")
    suffixed(data, ".", ".").rename(both / "train")
    suffixed(both / "val", "images", "images")
    split = find_split(both, mask_suffix="_mask")
    assert len(split.train) == len(split.val) == 6
    assert find_scored(both, "_mask") == split.val


def test_without_the_option_names_are_equal(data):
    suffixed(data)
    with pytest.raises(ValueError, match=r"image .*p0\.png has no mask with the same stem"):
        find_split(data)


def test_a_mask_folder_leaves_every_image_an_image(data):
    """An image may end in the suffix there."""
    suffixed(data)
    (data / "images" / "p5.png").rename(data / "images" / "p5_mask.png")
    (data / "masks" / "p5_mask.png").rename(data / "masks" / "p5_mask_mask.png")
    assert find_pairs(data, "_mask")[-1].stem == "p5_mask"


@pytest.mark.parametrize(
    "where, old, new, pattern",
    [
        (
            "masks",
            "masks/p2_mask.png",
            None,
            r"image .*p2\.png has no mask with the stem p2_mask in",
        ),
        ("masks", "images/p2.png", None, r"mask .*p2_mask\.png has no image with the stem 'p2'"),
        (
            "masks",
            "masks/p2_mask.png",
            "masks/p2.png",
            r"image .*p2\.png has no mask with the stem",
        ),
        (
            "images",
            "images/p2_mask.png",
            None,
            r"p2\.png has no mask with the stem p2_mask in .*ima",
        ),
        ("images", "images/p2.png", None, r"mask .*p2_mask\.png has no image with the stem 'p2'"),
        ("images", "images/p2.png", "images/p1_mask_mask.png", r"p1_mask_mask\.png is ambiguous:"),
        ("images", "images/p2.png", "images/p1.bmp", r"two files with the stem p1: p1\.bmp and p1"),
        ("images", "images/p2.png", "images/_mask.png", r"image with the stem '(p2)?'"),
        ("images", "images/p2.png", "images/p2.txt", r"p2\.txt is not a \.png"),
    ],
)
def test_names_that_do_not_fit(data, refused, where, old, new, pattern):
    suffixed(data, where)
    (data / old).unlink() if new is None else (data / old).rename(data / new)
    refused("finetune", "--data", data, *TINY, pattern=pattern)


def test_a_mask_of_no_suffix(data):
    suffixed(data)
    shutil.copy(data / "masks" / "p0_mask.png", data / "masks" / "extra.png")
    with pytest.raises(ValueError, match=r"extra\.png does not end in _mask before its file type"):
        find_pairs(data, "_mask")


def test_only_masks(data):
    suffixed(data, "images")
    for i in range(6):
        (data / "images" / f"p{i}.png").unlink()
    with pytest.raises(ValueError, match=r"has no images .*only files whose stems end in _mask"):
        find_pairs(data, "_mask")


@pytest.mark.parametrize("suffix", ["", "a/b", "a\\b", "\0", "_mask.png", "_m.TIF"])
def test_a_text_that_ends_no_stem_is_refused(tmp_path, suffix):
    settings = FinetuneSettings(data=tmp_path, model="vit_tiny", mask_suffix=suffix)
    with pytest.raises(ValueError, match=r"^mask_suffix is"):
        check_settings(settings)


def test_it_is_about_files_of_one_mask(tmp_path):
    settings = FinetuneSettings(data=tmp_path, model="vit_tiny", mask_suffix="_mask")
    check_settings(settings)
    with pytest.raises(
        ValueError, match="mask_suffix is _mask, but with several tasks each mask has"
    ):
        check_settings(FinetuneSettings(**{**vars(settings), "tasks": tmp_path / "t.yaml"}))
    with pytest.raises(ValueError, match="mask_suffix is about files, but a dataset is given"):
        check_of_dataset(FinetuneSettings(output=tmp_path, mask_suffix="_mask"))


@pytest.mark.slow_on_cpu
def test_training_and_scores_take_them(data, tmp_path, capsys):
    suffixed(data, ".", ".")
    out = tmp_path / "out"
    words = ("finetune", "--data", data, *TINY, "--output", out)
    assert cli.main([str(w) for w in words]) == 0
    capsys.readouterr()
    words = ("evaluate", "--adapter", out, "--data", data, "--json")
    assert cli.main([str(w) for w in (*words, "--mask-suffix", "_mask")]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert cli.main([str(w) for w in words]) == 2
    assert cli.main(["finetune", "--resume", str(out), "--epochs", "2"]) == 0
