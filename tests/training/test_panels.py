# SPDX-License-Identifier: Apache-2.0
"""Titled pictures: every pixel of theirs, every text whole, the classes that there are."""

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from samfast.training.panels import HEADERS, Mark, _font, printable, titled
from samfast.training.pictures import class_legend, task_pictures
from samfast.training.tasks import TaskSpec


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)


def place(canvas: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    """(row, column) of the one place where the canvas has the image."""
    windows = sliding_window_view(canvas, image.shape).squeeze(2)
    ((row, column),) = np.argwhere((windows == image).all((2, 3, 4)))
    return row, column


def blank(strip: np.ndarray) -> bool:
    return bool((strip == 255).all())


@pytest.mark.parametrize(("height", "width"), [(30, 90), (40, 32), (5, 3)])
def test_pictures_keep_their_pixels_and_texts_fit(height, width):
    images = [noise(height, width, i) for i in range(3)]
    title = "a rather long file name 细胞 Ж.png  Dice 0.5\n\udc80"
    legend = [Mark(np.zeros((1, 3), np.uint8), "x" * n) for n in (3, 60, 5)]
    canvas = np.asarray(titled(title, images, legend))
    places = [place(canvas, image) for image in images]
    assert len({row for row, _ in places}) == 1
    columns = [column for _, column in places]
    for here, after in zip(columns, [*columns[1:], canvas.shape[1]], strict=True):
        assert after - here >= width
    for strip in (canvas[:3], canvas[-3:], canvas[:, :3], canvas[:, -3:]):
        assert blank(strip)  # no text runs off the canvas
    font = _font(12)
    assert canvas.shape[1] > font.getlength("x" * 60)
    assert titled(title, images).width > font.getlength(printable(title))
    row = places[0][0]
    assert not blank(canvas[:row]) and not blank(canvas[row + height :])
    gaps = np.diff([*columns, canvas.shape[1]])
    assert all(gap > font.getlength(name) for gap, name in zip(gaps, HEADERS, strict=True))


def test_what_cannot_be_drawn_is_escaped():
    assert printable("a\nb\r\udc80 é细") == "a\\nb\\r\\udc80 é细"


def test_the_legend_has_the_classes_that_there_are():
    names = [f"class {i}" for i in range(40)]
    truth, prediction = np.array([[-1, 3, 3]]), np.array([[7, 3, 0]])
    assert [mark.text for mark in class_legend(names, truth, prediction)] == [
        *("class 0", "class 3", "class 7")
    ]
    many = np.concatenate([np.arange(30), np.arange(10, 30)])[None]  # 0 to 9 are the smallest
    texts = [mark.text for mark in class_legend(names, many, many)]
    assert texts == [*(names[i] for i in range(10, 30)), "+10 more"]


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        (TaskSpec("a"), []),
        (TaskSpec("a", "semantic", 2, classes=("rest", "cell")), ["cell"]),
        (TaskSpec("a", "regression", scale=0.5), ["2 to 2"]),
        (TaskSpec("a", "regression", 2, scale=0.5), ["2 to 2, channel 1 of 2"]),
        (TaskSpec("a", "regression", 3, loss="cosine"), ["x (right)", "y (down)", "z"]),
    ],
)
def test_every_kind_says_what_its_colours_mean(spec, texts):
    shape = (spec.channels, 8, 8) if spec.kind == "regression" else (8, 8)
    truth = torch.ones(shape, dtype=torch.float32 if spec.kind == "regression" else torch.int32)
    prediction = truth == 1 if spec.kind == "binary" else truth
    pictures, legend = task_pictures(spec, noise(8, 8), truth, prediction)
    assert [mark.text for mark in legend] == texts
    assert [picture.shape for picture in pictures] == [(8, 8, 3)] * 3
    if spec.kind == "regression" and spec.loss != "cosine":
        nowhere = torch.full_like(truth, torch.nan)
        _, (mark,) = task_pictures(spec, noise(8, 8), nowhere, prediction)
        assert mark.text.startswith("1 to 1")  # the prediction's, in stored units
