# SPDX-License-Identifier: Apache-2.0
"""Masks whose compression changes values: found again, or refused."""

import itertools

import numpy as np
import pytest
from PIL import Image

from samfast.training.data import PairDataset
from samfast.training.folders import load_split
from samfast.training.foreground import Above, binary_mask, chosen_foreground
from samfast.training.images import load_mask, read_mask

FORMATS = {"jpg": {}, "webp": {}, "tif": {"compression": "jpeg"}}
ANY = chosen_foreground("any")


def scene(seed: int, side: int, size: int, values=(255,), background: int = 0) -> np.ndarray:
    """A map of discs and squares of this size, one for each value and one more, well apart."""
    rng = np.random.default_rng(seed)
    mask = np.full((side, side), background, np.uint8)
    y, x = np.mgrid[:side, :side]
    cells = list(itertools.product(range(2), range(2)))
    for i, (row, column) in enumerate(cells[: len(values) + 1]):
        top, left = (c * side // 2 + rng.integers(1, side // 2 - size) for c in (row, column))
        if i % 2:
            inside = (y - top - size / 2) ** 2 + (x - left - size / 2) ** 2 <= size**2 / 4
        else:
            inside = (y >= top) & (y < top + size) & (x >= left) & (x < left + size)
        mask[inside] = values[i % len(values)]
    return mask


def saved(folder, mask: np.ndarray, suffix: str, quality: int, name: str = "m"):
    path = folder / f"{name}.{suffix}"
    Image.fromarray(mask).save(path, quality=quality, **FORMATS[suffix])
    return path


def check_grid(folder, suffix, qualities, sides, sizes, seeds) -> None:
    grid = itertools.product(qualities, sides, sizes, seeds)
    for quality, side, size, seed in grid:
        if size >= side // 2 - 1:
            continue
        mask = scene(seed, side, size)
        for stored in (mask, 255 - mask):
            found = read_mask(saved(folder, stored, suffix, quality))
            assert np.array_equal(found, stored), (quality, side, size, seed)


@pytest.mark.parametrize("suffix", FORMATS)
def test_two_values_are_found_again_in_every_pixel(tmp_path, suffix):
    check_grid(tmp_path, suffix, (50, 75, 95), (24, 61), (2, 3, 9, 20), range(2))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_two_values_are_found_again_in_a_whole_grid(tmp_path, suffix):
    sizes = (2, 3, 4, 5, 7, 10, 20, 40)
    check_grid(tmp_path, suffix, range(50, 96, 5), (16, 24, 33, 61, 128), sizes, range(6))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("value", [200, 128])
def test_the_threshold_lies_midway_between_two_values(tmp_path, suffix, value):
    for quality, seed in itertools.product((75, 95), range(3)):
        mask = scene(seed, 96, 30, (value,))
        found = read_mask(saved(tmp_path, mask, suffix, quality))
        assert np.array_equal(found > 0, mask > 0), (quality, seed)
        assert abs(int(found.max()) - value) <= 3
        named = read_mask(tmp_path / f"m.{suffix}", (value,))  # as the option names it
        assert set(np.unique(named)) == {0, value}


def test_masks_of_0_and_1(tmp_path):
    for seed in range(3):
        mask = scene(seed, 64, 22, (1,))
        found = read_mask(saved(tmp_path, mask, "jpg", 95))
        assert set(np.unique(found)) == {0, 1}
        assert (found != mask).sum() <= 0.05 * mask.sum()  # the file itself has lost these
        assert binary_mask(found).any()


def test_masks_of_one_value_stay_so(tmp_path):
    for value in (0, 85, 255):
        for suffix, quality in itertools.product(FORMATS, (50, 95)):
            path = saved(tmp_path, np.full((20, 30), value, np.uint8), suffix, quality)
            assert abs(int(read_mask(path).max()) - value) <= 1
            assert len(np.unique(read_mask(path))) == 1


MANY = {
    "three": (85, 170),
    "three to 255": (128, 255),
    "four": (60, 120, 180),
    "three small ones": (1, 2),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", MANY)
def test_more_than_two_values_get_the_sentence_of_a_png(data, suffix, name):
    values = MANY[name]
    for quality, size in itertools.product(
        (80, 95) if name != "three small ones" else (95,), (8, 26)
    ):
        mask = np.array(Image.open(data / "masks" / "p0.png"))
        mask = scene(1, 64, size, values)[: mask.shape[0], : mask.shape[1]]
        assert len(np.unique(mask)) == len(values) + 1
        (data / "masks" / "p0.png").unlink(missing_ok=True)
        saved(data / "masks", mask, suffix, quality, "p0")
        with pytest.raises(
            ValueError, match=r"p0\.\w+ holds \d+ values .*; say what is foreground"
        ):
            load_split(data)
        Image.fromarray(mask).save(data / "masks" / "p0.png")
        (data / "masks" / f"p0.{suffix}").unlink()
        with pytest.raises(
            ValueError, match=r"p0\.png holds \d+ values .*; say what is foreground"
        ):
            load_split(data)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_small_object_of_a_third_value_close_to_a_large_one(tmp_path, suffix):
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 8:40] = 255
    assert len(np.unique(read_mask(saved(tmp_path, mask, suffix, 90)))) == 2
    mask[20:24, 44:48] = 128  # nowhere flat, and where the large one rings
    assert len(np.unique(read_mask(saved(tmp_path, mask, suffix, 90)))) > 2


def test_any_and_a_threshold_read_lossy_masks_of_many_values(tmp_path):
    mask = scene(3, 96, 30, (85, 170))
    path = saved(tmp_path, mask, "jpg", 90)
    assert np.array_equal(read_mask(path, ANY) > 0, mask > 0)
    decoded = np.asarray(Image.open(path))
    assert np.array_equal(read_mask(path, Above(127.0)), decoded)
    assert np.array_equal(decoded > 127, mask == 170)
    with pytest.raises(ValueError, match="lost values to compression: its 3 values blend; save"):
        read_mask(path, (85,))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    path = saved(tmp_path, noise, "jpg", 90)
    with pytest.raises(ValueError, match="its values cannot be told apart; save it as PNG, or"):
        read_mask(path, ANY)


def test_lossy_masks_of_classes_and_of_colours_are_refused(tmp_path):
    path = saved(tmp_path, scene(0, 64, 20, (1,)), "jpg", 95)
    with pytest.raises(ValueError, match="uses lossy compression, which changes class numbers"):
        load_mask(path, labels=True)
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[:, :16, 0] = 255
    Image.fromarray(colours).save(tmp_path / "c.jpg")
    with pytest.raises(ValueError, match=r"c\.jpg is a colour image whose channels differ"):
        read_mask(tmp_path / "c.jpg")
    grey = scene(0, 64, 20)
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "g.jpg", quality=70)
    assert np.array_equal(read_mask(tmp_path / "g.jpg"), grey)


def test_a_lossless_webp_is_not_lossy(tmp_path):
    mask = scene(0, 48, 12, (1, 2, 3))
    Image.fromarray(mask).save(tmp_path / "m.webp", lossless=True)
    assert np.array_equal(read_mask(tmp_path / "m.webp"), mask)


@pytest.mark.parametrize("value", [255, 128])
def test_a_folder_of_lossy_masks_with_objects_of_any_size(data, value):
    for i, size in enumerate((2, 22, 3, 5, 15, 22)):
        (data / "masks" / f"p{i}.png").unlink()
        height = 48 + 4 * i
        saved(data / "masks", scene(i, 68, size, (value,))[:height, :64], "jpg", 85, f"p{i}")
    split = load_split(data)
    for sample in PairDataset((*split.train, *split.val), 64):
        assert 0 < sample.truth.sum() < 0.5 * sample.truth.size


def test_lossy_masks_that_disagree(data):
    for i, value in enumerate((85, 85, 255, 255, 85, 85)):
        (data / "masks" / f"p{i}.png").unlink()
        saved(data / "masks", scene(i, 68, 22, (value,))[: 48 + 4 * i, :64], "jpg", 90, f"p{i}")
    with pytest.raises(ValueError, match=r"together hold more than two values: 0, 85, 255"):
        load_split(data)
