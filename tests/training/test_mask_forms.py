# SPDX-License-Identifier: Apache-2.0
"""Masks in .gif and .npy files."""

import io

import numpy as np
import pytest
from numpy.lib import format as npy
from PIL import Image

from samfast.training import npy_files
from samfast.training.data import PairDataset
from samfast.training.folders import find_pairs, load_split
from samfast.training.images import read_image, read_mask
from samfast.training.task_files import check_items, find_items
from samfast.training.tasks import TaskSpec

MASK = np.array([[0, 1, 1], [0, 0, 1]], np.uint8)


def gif(path, values, palette=None, frames=1):
    """Frames of palette indices, the same but for their first pixel."""
    made = []
    for i in range(frames):
        own = values.copy()
        own[0, 0] ^= i
        image = Image.fromarray(own).convert("L") if palette is None else Image.fromarray(own, "P")
        if palette is not None:
            image.putpalette(sum(palette, ()))
        made.append(image)
    made[0].save(path, save_all=frames > 1, append_images=made[1:])
    return path


def header(path, shape, dtype="|u1", content=b"", version=(1, 0)):
    """A .npy file whose header may promise anything."""
    file = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    write = npy.write_array_header_1_0 if version == (1, 0) else npy.write_array_header_2_0
    write(file, described)
    path.write_bytes(file.getvalue() + content)
    return path


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)


@pytest.mark.parametrize(
    "palette, expected",
    [
        (None, MASK),
        ((BLACK, WHITE), MASK * 255),
        ((WHITE, BLACK), (1 - MASK) * 255),  # what is white is the object, wherever it stands
        ((BLACK, RED), MASK),
        ((RED, BLACK), MASK),
    ],
)
def test_a_gif_gives_greys_or_indices(tmp_path, palette, expected):
    path = gif(tmp_path / "m.gif", MASK, palette)
    assert read_mask(path).tolist() == expected.tolist()


def test_a_gif_is_one_whole_frame_of_a_mask(tmp_path):
    with pytest.raises(
        ValueError, match=r"m\.gif holds 2 frames; save the one you mean to a file of its own"
    ):
        read_mask(gif(tmp_path / "m.gif", MASK, frames=2))
    path = gif(tmp_path / "n.gif", np.random.default_rng(0).integers(0, 256, (50, 50), np.uint8))
    with pytest.raises(ValueError, match=r"n\.gif cannot be decoded: it is not a PNG, .*TIFF"):
        read_image(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"n\.gif cannot be decoded"):
        read_mask(path)
    path.write_bytes(b"none")
    with pytest.raises(ValueError, match=r"n\.gif cannot be decoded: .*GIF, TIFF file"):
        read_mask(path)
    (tmp_path / "g.png").write_bytes(whole)
    with pytest.raises(ValueError, match=r"g\.png cannot be decoded: it is not a PNG"):
        read_mask(tmp_path / "g.png")


@pytest.mark.parametrize("dtype", [bool, "u1", "<i2", ">i2", "<i4", ">u4", "<i8", "u8"])
def test_arrays_of_whole_numbers(tmp_path, dtype):
    path = tmp_path / "m.npy"
    np.save(path, np.asfortranarray(MASK.astype(dtype)))
    found = read_mask(path)
    assert found.tolist() == MASK.tolist() and found.dtype.isnative and found.itemsize <= 4
    assert found.dtype != bool


@pytest.mark.parametrize(
    "values, sentence",
    [
        (np.zeros((2, 3)), r"holds float64 \(2, 3\); expected bool or whole numbers"),
        (np.zeros((2, 3, 1), np.uint8), r"holds uint8 \(2, 3, 1\); expected"),
        (np.zeros((0, 3), np.uint8), r"holds uint8 \(0, 3\); expected"),
        (np.zeros(3, np.uint8), r"holds uint8 \(3,\); expected"),
        (np.array([["a"]]), r"holds <U1 \(1, 1\); expected"),
        (np.array([[2**31]]), "holds the value 2147483648; expected at most 32 bits"),
        (np.array([[-(2**31) - 1]]), "holds the value -2147483649; expected at most 32 bits"),
        (np.array([[{}]], object), "cannot be decoded: Object arrays are not read"),
    ],
)
def test_other_arrays_are_refused(tmp_path, values, sentence):
    np.save(tmp_path / "m.npy", values, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"m\.npy {sentence}"):
        read_mask(tmp_path / "m.npy")


def test_headers_that_promise_too_much(tmp_path, monkeypatch):
    """Nothing is read of them, so that no memory is asked for."""

    def load(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(npy_files.np, "load", load)
    path = tmp_path / "m.npy"
    for shape, sentence in [
        ((4, 5), r"it is truncated: uint8 \(4, 5\) takes more than"),
        ((10**7, 10**7), "more than .* pixels; cut it into parts"),
        ((2, 10**30), "more than .* pixels"),
        ((-1, 5), r"its shape is \(-1, 5\)"),
    ]:
        header(path, shape, content=bytes(19))
        with pytest.raises(ValueError, match=rf"m\.npy cannot be decoded: .*{sentence}"):
            read_mask(path)
    header(path, (2, 2), content=bytes(3), version=(2, 0))
    with pytest.raises(ValueError, match="it is truncated"):
        read_mask(path)


def test_every_cut_of_an_array_ends_in_a_sentence(tmp_path):
    np.save(tmp_path / "m.npy", MASK)
    whole = (tmp_path / "m.npy").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "c.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"c\.npy cannot be decoded"):
            read_mask(tmp_path / "c.npy")
    with pytest.raises(FileNotFoundError, match=r"none\.npy does not exist"):
        read_mask(tmp_path / "none.npy")
    (tmp_path / "d.npy").mkdir()
    with pytest.raises(ValueError, match=r"d\.npy is not a regular file"):
        read_mask(tmp_path / "d.npy")


@pytest.mark.parametrize("ending", ["gif", "npy"])
def test_a_folder_of_them(data, ending):
    plain = PairDataset(find_pairs(data), 64)
    truths = [plain[i].truth for i in range(6)]
    for path in (data / "masks").iterdir():
        mask = Image.open(path)
        if ending == "gif":
            mask.save(path.with_suffix(".gif"))
        else:
            np.save(path.with_suffix(".npy"), np.asarray(mask) > 0)
        path.unlink()
    load_split(data)
    found = PairDataset(find_pairs(data), 64)
    assert all(np.array_equal(found[i].truth, truth) for i, truth in enumerate(truths))
    specs = (TaskSpec("cells"),)
    check_items(find_items(data, specs, only_score=True).val, specs)
    for path in (data / "masks").iterdir():
        path.rename(data / "images" / f"{path.stem}_m{path.suffix}")
    (data / "masks").rmdir()
    assert [pair.stem for pair in find_pairs(data, "_m")] == [f"p{i}" for i in range(6)]
    (data / "images" / f"x.{ending}").touch()
    with pytest.raises(ValueError, match=rf"x\.{ending} is not a \.png, .*\.webp file; move it"):
        find_pairs(data, "_m")
