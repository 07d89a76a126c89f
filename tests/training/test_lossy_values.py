# SPDX-License-Identifier: Apache-2.0
"""Lossy masks of random shapes: third values are seen, and near values are never taken silently."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw

from samfast.training.folders import load_split
from samfast.training.foreground import chosen_foreground
from samfast.training.images import load_mask, read_mask
from samfast.training.jpeg_blocks import first_steps
from samfast.training.task_files import check_items, find_items
from samfast.training.tasks import TaskSpec

THIRDS = {
    "jpg": ((10, 255), (245, 255), (230, 255), (1, 2), (1, 255)),
    "tif": ((10, 255), (245, 255), (1, 255)),
    "webp": ((10, 255), (245, 255), (230, 255)),
}
FORMATS = {"jpg": {}, "webp": {}, "tif": {"compression": "jpeg"}}


def shapes(seed: int, values: tuple[int, ...], side: int = 128) -> np.ndarray:
    """Ellipses and polygons that overlap and touch; of every value at least 200 pixels."""
    rng = np.random.default_rng(seed)
    while True:
        image = Image.new("L", (side, side - 5), 0)
        draw = ImageDraw.Draw(image)
        for i in range(5):
            middle, radius = rng.integers(0, side, 2), rng.integers(9, 34, 2)
            if rng.random() < 0.5:
                box = [*(middle - radius).tolist(), *(middle + radius).tolist()]
                draw.ellipse(box, fill=values[i % len(values)])
            else:
                angles = np.sort(rng.random(rng.integers(3, 8))) * 2 * np.pi
                corners = middle + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
                draw.polygon(list(map(tuple, corners.tolist())), fill=values[i % len(values)])
        mask = np.array(image)
        if min(np.count_nonzero(mask == value) for value in (0, *values)) > 200:
            return mask


def saved(path, mask: np.ndarray, quality: int, **options):
    Image.fromarray(mask).save(path, quality=quality, **FORMATS[path.suffix[1:]], **options)
    return path


def count(path) -> int:
    return len(np.unique(read_mask(path)))


def check_thirds(tmp_path, suffix: str, qualities, seeds) -> None:
    for values in THIRDS[suffix]:
        for quality in qualities:
            for seed in seeds:
                path = saved(tmp_path / f"m.{suffix}", shapes(seed, values), quality)
                found = load_mask(path)
                seen = len(np.unique(found.values)) > 2
                # Of 1 and 2, no whole block may be 2; then there is the warning.
                assert seen or (found.blurred and values == (1, 2)), (values, quality, seed)


def check_pairs_of_values(tmp_path, suffix: str, qualities, seeds) -> None:
    for quality in qualities:
        for seed in seeds:
            mask = shapes(seed, (255,))
            for stored in (mask, 255 - mask):
                found = load_mask(saved(tmp_path / f"m.{suffix}", stored, quality))
                assert np.array_equal(found.values, stored), (quality, seed)
                assert not found.blurred


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_third_value_is_seen_and_two_values_are_read(tmp_path, suffix):
    check_thirds(tmp_path, suffix, (75, 95), range(4))
    check_pairs_of_values(tmp_path, suffix, (50, 75, 95), range(4))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_third_value_is_seen_and_two_values_are_read_in_a_whole_grid(tmp_path, suffix):
    check_thirds(tmp_path, suffix, range(75, 96, 5), range(40))
    check_pairs_of_values(tmp_path, suffix, range(50, 96, 5), range(40))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_and_coloured_jpegs_are_checked_block_by_block(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for seed in range(3):
        mask = shapes(seed, (255,))
        path = saved(tmp_path / "m.jpg", np.stack([mask] * 3, -1), 80, exif=exif, progressive=True)
        found = load_mask(path)
        assert np.count_nonzero(found.values) == np.count_nonzero(mask)
        assert not found.blurred
        mask[:, :24] = 0
        mask[64:72, 8:16] = 1  # a single block
        path = saved(tmp_path / "m.jpg", mask, 80, exif=exif)
        assert count(path) > 2
        third = np.stack([shapes(seed, (1, 255))] * 3, -1)
        assert count(saved(tmp_path / "m.jpg", third, 80, exif=exif, progressive=True)) > 2


def test_the_steps_of_a_jpeg_are_those_that_pillow_reads(tmp_path):
    for quality in (10, 50, 90):
        path = saved(tmp_path / "m.jpg", shapes(0, (255,)), quality)
        with Image.open(path) as image:
            assert list(first_steps(path.read_bytes())) == list(image.quantization[0])
    whole = path.read_bytes()
    assert all(first_steps(whole[:n]) is None for n in range(20))


def test_near_values_are_kept_apart_or_refused(tmp_path):
    path = tmp_path / "m.jpg"
    for low, high in ((100, 104), (250, 255), (251, 255), (0, 250), (0, 3)):
        mask = np.full((64, 64), low, np.uint8)
        mask[16:48, 16:40] = high
        assert set(np.unique(read_mask(saved(path, mask, 95)))) == {low, high}
        assert np.array_equal(read_mask(path, (high,)) == high, mask == high)
        mask[16:48, 16:40] = low
        mask[17:20, 30:33] = high  # nowhere flat
        if high - low > 8:
            continue
        assert count(saved(path, mask, 95)) > 2
        with pytest.raises(ValueError, match="its values cannot be told apart; save it as PNG, or"):
            read_mask(path, chosen_foreground("any"))


def test_0_stays_0_whatever_the_option_names(tmp_path):
    path = saved(tmp_path / "m.jpg", np.zeros((32, 32), np.uint8), 90)
    assert not read_mask(path, (1,)).any()
    path = saved(path, shapes(0, (255,)), 90)
    assert set(np.unique(read_mask(path, (1, 255)))) == {0, 255}


@pytest.mark.parametrize("suffix", FORMATS)
def test_masks_of_0_and_1_are_read_with_a_warning(data, suffix):
    for i in range(6):
        old = data / "masks" / f"p{i}.png"
        size = Image.open(old).size
        old.unlink()
        mask = shapes(i, (1,))[: size[1], : size[0]]
        mask[8:32, 8:32] = 1
        saved(old.with_suffix(f".{suffix}"), mask, 90)
    sentence = (
        rf"6 of 6 masks are compressed so strongly that some pixels may have the wrong value "
        rf"\(values 0 and 1 in .*p\d\.{suffix}\); save masks as PNG"
    )
    with pytest.warns(UserWarning, match=sentence):
        load_split(data)
    specs = [TaskSpec("cells", folder="masks")]
    with pytest.warns(UserWarning, match=sentence):
        check_items(find_items(data, specs, only_score=True).val, specs)


def test_lossy_masks_without_an_object_next_to_blurred_ones_are_counted(data):
    for i in range(6):
        old = data / "masks" / f"p{i}.png"
        mask = np.zeros(Image.open(old).size[::-1], np.uint8)
        old.unlink()
        mask[8:10] = 1  # two rows, which such a quality does not keep
        mask[16:40, 16:40] = i > 1
        saved(old.with_suffix(".jpg"), mask, 75)
    with pytest.warns(UserWarning, match=r"4 of 6 masks .*; 2 masks hold only one value and may"):
        load_split(data)


def test_a_tiff_with_longer_sides_than_a_jpeg_is_read(tmp_path):
    mask = np.zeros((65536, 8), np.uint8)
    mask[65000:] = 255
    saved(tmp_path / "m.tif", mask, 75)
    assert np.array_equal(read_mask(tmp_path / "m.tif"), mask)


def test_pixels_that_took_the_other_value_are_said_and_others_are_not(tmp_path):
    path, said = tmp_path / "m.jpg", 0
    for seed in range(8):
        mask = shapes(seed, (60,))
        found = load_mask(saved(path, mask, 75))
        wrong = ((found.values > 0) != (mask > 0)).any()
        assert found.blurred or not wrong or len(np.unique(found.values)) > 2
        said += bool(found.blurred)
        assert not load_mask(saved(path, shapes(seed, (128,)), 90)).blurred
    assert said


def test_clear_masks_give_no_warning(data):
    for i in range(6):
        old = data / "masks" / f"p{i}.png"
        size = Image.open(old).size
        old.unlink()
        saved(old.with_suffix(".jpg"), shapes(i, (255,))[: size[1], : size[0]], 75)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_split(data)
