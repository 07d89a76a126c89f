# SPDX-License-Identifier: Apache-2.0
"""Objects of one image, from labels and from run lengths, against masks one by one."""

import time

import numpy as np
import pytest

from samfast.training.boxes import foreground_box
from samfast.training.objects import Objects
from samfast.training.rle import compressed, counts_of, counts_of_runs

pycocotools = pytest.importorskip("pycocotools.mask")


def blobs(seed: int, height: int = 23, width: int = 31, count: int = 6) -> list[np.ndarray]:
    """Masks that overlap: rectangles with holes, single pixels, whole columns."""
    rng = np.random.default_rng(seed)
    masks = []
    for i in range(count):
        mask = np.zeros((height, width), bool)
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, height), x : x + rng.integers(1, width)] = True
        mask &= rng.random(mask.shape) < (1.0 if i % 2 else 0.7)
        mask[y, x] = True
        masks.append(mask)
    return masks


def rle_of(mask: np.ndarray, text: bool) -> dict:
    """Run lengths by pycocotools, as a list by counting columns."""
    if text:
        rle = pycocotools.encode(np.asfortranarray(mask, np.uint8))
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask.T.ravel()
    counts, value = [0], False
    for pixel in flat.tolist():
        if pixel != value:
            counts, value = [*counts, 0], pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def labels_by_hand(masks: list[np.ndarray]) -> np.ndarray:
    out = np.zeros(masks[0].shape, np.int32)
    for i in sorted(range(len(masks)), key=lambda i: (-masks[i].sum(), -i)):
        out[masks[i]] = i + 1
    return out


def check(objects: Objects, masks: list[np.ndarray]) -> None:
    """Everything that Objects tells, against the masks themselves."""
    assert len(objects) == len(masks)
    assert objects.size == masks[0].shape
    assert objects.boxes.dtype == np.float64
    for i, mask in enumerate(masks):
        np.testing.assert_array_equal(objects.mask(i), mask)
        np.testing.assert_array_equal(objects.boxes[i], foreground_box(mask))
        np.testing.assert_array_equal(objects.crop(i), mask[objects.window(i)])
        assert objects.areas[i] == mask.sum()
        counts = counts_of_runs(*objects.runs(i), mask.size)
        np.testing.assert_array_equal(counts, rle_of(mask, text=False)["counts"])
        assert compressed(counts) == rle_of(mask, text=True)["counts"]
    assert objects.labels().dtype == np.int32
    np.testing.assert_array_equal(objects.labels(), labels_by_hand(masks))


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_run_lengths(seed, text):
    masks = blobs(seed)
    objects = Objects.from_rles(masks[0].shape, [rle_of(mask, text) for mask in masks])
    check(objects, masks)
    assert objects.ids.tolist() == list(range(len(masks)))


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "u4", "i8", "u8", ">u2"])
def test_labels_of_any_ids(dtype):
    ids = [3, 4, 200] if dtype == "u1" else [2, 900, 30_000]
    if dtype in ("u4", "i8", "u8"):
        ids.append(2**32 - 1)
    labels = np.zeros((20, 30), dtype)
    rng = np.random.default_rng(1)
    for value in ids:
        labels[rng.random(labels.shape) < 0.1] = value
    objects = Objects.from_labels(labels)
    assert objects.ids.tolist() == ids
    assert objects.empty == 0
    check(objects, [labels == value for value in ids])


def test_labels_without_background():
    objects = Objects.from_labels(np.full((2, 3), 2**40))
    check(objects, [np.ones((2, 3), bool)])
    check(Objects.from_labels(np.full((2, 3), 7)), [np.ones((2, 3), bool)])


@pytest.mark.parametrize(
    "of",
    [
        lambda: Objects.from_labels(np.zeros((4, 5), np.uint8)),
        lambda: Objects.from_rles((4, 5), []),
    ],
)
def test_none(of):
    objects = of()
    assert len(objects) == 0 and objects.size == (4, 5)
    assert objects.boxes.shape == (0, 4) and objects.areas.shape == (0,)
    assert not objects.labels().any() and objects.labels().shape == (4, 5)
    with pytest.raises(IndexError):
        objects.mask(0)


def test_objects_of_no_pixel_are_left_out_and_counted():
    full = {"size": [2, 3], "counts": [0, 6]}
    none = {"size": [2, 3], "counts": [6]}
    objects = Objects.from_rles((2, 3), [none, full, {**none, "counts": [2, 0, 4]}, full])
    assert (len(objects), objects.empty, objects.ids.tolist()) == (2, 2, [1, 3])
    assert (objects.labels() == 1).all()  # of equal ones the first is on top
    with pytest.raises(IndexError, match="object -1 of 2"):
        objects.mask(-1)


def test_run_lengths_that_touch():
    """Runs of no background between two of foreground, and across columns."""
    rle = {"size": [3, 4], "counts": [1, 2, 0, 3, 1, 0, 0, 1, 4]}
    mask = np.zeros((3, 4), bool)
    mask[1:3, 0] = mask[:, 1] = mask[1, 2] = True  # columns 011 111 010 000
    check(Objects.from_rles((3, 4), [rle]), [mask])
    over = np.zeros((3, 4), bool)  # from the end of a column to the start of the next
    over[2, 0] = over[0, 1] = True
    check(Objects.from_rles((3, 4), [{"size": [3, 4], "counts": [2, 2, 8]}]), [over])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((3, 3)), "labels are float64"),
        (np.zeros((3, 3), bool), "labels are bool"),
        (np.zeros((3, 3, 1), int), r"shape \(3, 3, 1\)"),
        (np.zeros((0, 3), int), r"shape \(0, 3\)"),
        (np.array([[0, -4]]), "labels hold -4"),
    ],
)
def test_labels_that_are_none(labels, words):
    with pytest.raises(ValueError, match=words):
        Objects.from_labels(labels)


@pytest.mark.parametrize(
    ("rle", "words"),
    [
        (None, "is None; expected an RLE"),
        ({"size": [2, 3]}, "expected an RLE with size and counts"),
        ({"size": [3, 2], "counts": [6]}, r"size \[3, 2\] in an image of size \[2, 3\]"),
        ({"size": [2, True], "counts": [6]}, r"size \[2, True\]"),
        ({"size": [2, 2**31], "counts": [6]}, "integers from 1 to"),
        ({"size": "23", "counts": [6]}, "size '23'"),
        ({"size": [2, 3], "counts": 6}, "counts 6"),
        ({"size": [2, 3], "counts": [5]}, "add up to 5, and height . width is 6"),
        ({"size": [2, 3], "counts": [5, 2]}, "add up to 7"),
        ({"size": [2, 3], "counts": []}, "add up to 0"),
        ({"size": [2, 3], "counts": [7, -1]}, "run length 7"),
        ({"size": [2, 3], "counts": [5, -1, 2]}, "run length -1"),
        ({"size": [2, 3], "counts": [5, 1.0]}, "run length 1.0"),
        ({"size": [2, 3], "counts": [5, True]}, "run length True"),
        ({"size": [2, 3], "counts": [10**30]}, "run length 1000"),
        ({"size": [2, 3], "counts": ""}, "add up to 0"),
        ({"size": [2, 3], "counts": "é"}, "not a compressed RLE"),
        ({"size": [2, 3], "counts": "7 "}, "not a compressed RLE"),
        ({"size": [2, 3], "counts": "5Q"}, "ends within a number"),
        ({"size": [2, 3], "counts": "oooooooo0"}, "ends within a number"),
        ({"size": [2, 3], "counts": "O7"}, "one is -1"),
    ],
)
def test_run_lengths_that_do_not_fit(rle, words):
    with pytest.raises(ValueError, match=f"object 0 .*{words}") as caught:
        Objects.from_rles((2, 3), [rle])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(30))
def test_compressed_numbers_of_any_size(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 1 << rng.integers(1, 31, 40))
    size = (1, int(counts.sum()))
    if size[1] > 2**31 - 1:
        counts, size = counts % 1000, (1, int((counts % 1000).sum()))
    rle = {"size": list(size), "counts": compressed(counts)}
    np.testing.assert_array_equal(counts_of(rle, size), counts)
    np.testing.assert_array_equal(counts_of({**rle, "counts": counts}, size), counts)


def test_thousands_of_objects_are_quick():
    """2,000 objects in 2000 x 2000 pixels; a comparison of all pixels with each takes seconds."""
    labels = np.zeros((2000, 2000), np.int32)
    grid = np.arange(1, 2026).reshape(45, 45)
    labels[: 45 * 44, : 45 * 44] = np.kron(grid, np.ones((44, 44), np.int32))
    labels[(np.arange(2000) % 44 < 4)] = 0
    began = time.process_time()
    objects = Objects.from_labels(labels)
    rles = [
        {"size": [2000, 2000], "counts": counts_of_runs(*objects.runs(i), labels.size)}
        for i in range(len(objects))
    ]
    again = Objects.from_rles((2000, 2000), rles)
    np.testing.assert_array_equal(again.labels(), objects.labels())
    assert time.process_time() - began < 6
    assert len(objects) == 2025
    np.testing.assert_array_equal(again.boxes, objects.boxes)
    np.testing.assert_array_equal(again.areas, objects.areas)
