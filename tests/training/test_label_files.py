# SPDX-License-Identifier: Apache-2.0
"""Label images of every form that is read, and one sentence for those that are not."""

import os

import numpy as np
import pytest
import tifffile
from PIL import Image

from samfast.training.label_files import read_labels

LABELS = np.array([[0, 0, 7], [3, 3, 120]])


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "i4", ">u2", "u8"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff(tmp_path, dtype, compression):
    path = tmp_path / "labels.tif"
    labels = LABELS.astype(dtype)
    tifffile.imwrite(path, labels, compression=compression, byteorder=">" if ">" in dtype else "<")
    read = read_labels(path)
    assert read.dtype.kind == labels.dtype.kind
    np.testing.assert_array_equal(read, LABELS)


def test_large_and_negative_values_are_kept(tmp_path):
    for name, dtype, value in (("a.tif", "u4", 2**32 - 1), ("b.tif", "i4", -5)):
        tifffile.imwrite(tmp_path / name, np.array([[0, value]], dtype))
        assert read_labels(tmp_path / name).tolist() == [[0, value]]


def test_png_of_8_and_16_bits(tmp_path):
    for dtype in (np.uint8, np.uint16):
        labels = (LABELS * (500 if dtype == np.uint16 else 1)).astype(dtype)
        Image.fromarray(labels).save(tmp_path / "labels.png")
        np.testing.assert_array_equal(read_labels(tmp_path / "labels.png"), labels)


def test_a_palette_gives_its_indices(tmp_path):
    image = Image.fromarray(LABELS.astype(np.uint8), "L")
    image = image.convert("L")
    image.putpalette([i * 7 % 256 for i in range(768)])
    assert image.mode == "P"
    image.save(tmp_path / "labels.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "labels.png"), LABELS)


@pytest.mark.parametrize("dtype", ["u1", "i4", ">i2", "u8"])
@pytest.mark.parametrize("order", "CF")
def test_npy(tmp_path, dtype, order):
    np.save(tmp_path / "labels.npy", np.array(LABELS, dtype, order=order))
    read = read_labels(tmp_path / "labels.npy")
    np.testing.assert_array_equal(read, LABELS)
    read[0, 0] = 1  # nobody else's memory
    assert read.dtype.isnative


def test_no_data_is_background(tmp_path):
    labels = np.array([[0, 65535], [65535, 2]], np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", labels, extratags=[(42113, "s", 0, "65535", True)])
    assert read_labels(tmp_path / "a.tif").tolist() == [[0, 0], [0, 2]]


def bad_npy(path, kind: str) -> None:
    if kind == "cut":
        np.save(path, np.zeros((50, 50), np.int32))
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "huge":
        header = "{'descr': '<i4', 'fortran_order': False, 'shape': (2000000, 2000000), }"
        path.write_bytes(
            b"\x93NUMPY\x01\x00" + bytes([118, 0]) + header.ljust(117).encode() + b"\n"
        )
    elif kind == "pickle":
        np.save(path, np.array([[object()]], object), allow_pickle=True)
    elif kind == "archive":
        with path.open("wb") as file:
            np.savez(file, a=LABELS)
    elif kind == "text":
        path.write_bytes(b"no array")
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["cut", "huge", "pickle", "archive", "text", "empty"])
def test_npy_that_is_none(tmp_path, kind):
    path = tmp_path / "labels.npy"
    bad_npy(path, kind)
    with pytest.raises(ValueError, match=r"labels\.npy") as caught:
        read_labels(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("a.npy", np.zeros((2, 2)), "holds float64"),
        ("a.npy", np.zeros((2, 2, 2), int), r"\(2, 2, 2\)"),
        ("a.tif", np.zeros((2, 2), np.float32), "holds floats of 32 bits"),
        ("a.png", np.arange(12, dtype=np.uint8).reshape(2, 2, 3), "colour image"),
        ("a.tif", np.arange(12, dtype=np.uint8).reshape(2, 2, 3), "colour image"),
        ("a.jpg", np.zeros((8, 8), np.uint8), "lossy compression"),
        ("a.png", np.arange(16, dtype=np.uint8).reshape(2, 2, 4) // 4 * 4, "varies in"),
    ],
)
def test_what_is_no_label_image(tmp_path, name, values, words):
    path = tmp_path / name
    if name.endswith("npy"):
        np.save(path, values)
    elif name.endswith("tif"):
        tifffile.imwrite(path, values, photometric="rgb" if values.ndim == 3 else "minisblack")
    else:
        if values.shape[2:] == (4,):
            values = np.dstack([values[..., :1]] * 3 + [values[..., 3:]])
        Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=words) as caught:
        read_labels(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.npy", "a.png"])
def test_no_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_labels(tmp_path / name)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="not a regular file"):
        read_labels(tmp_path / name)
