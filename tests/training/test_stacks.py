# SPDX-License-Identifier: Apache-2.0
"""Stacks: which pages are slices, what each slice holds, and how stacks are split."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from PIL import Image
from stacks_folder import fill_with_stacks, volume, write_stack
from tiff_writer import Picture, write_tiff

from samfast.training import image_files
from samfast.training.chosen_tasks import INSTANCES
from samfast.training.fingerprints import of_pairs
from samfast.training.folders import check_pairs, find_scored, find_split
from samfast.training.image_options import ImageOptions
from samfast.training.images import read_image, read_mask, read_values
from samfast.training.label_files import read_labels
from samfast.training.stacks import Slice, file_of, image_slices, mask_slices
from samfast.training.task_files import check_items, find_items
from samfast.training.tasks import TaskSpec

SEMANTIC = TaskSpec("masks", kind="semantic", channels=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill_with_stacks(tmp_path_factory.mktemp("stacks") / "data")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return fill_with_stacks(tmp_path_factory.mktemp("stacks") / "labelled", binary=False)


def test_slices_of_one_stack_are_on_one_side_whatever_the_seed(folder, labelled):
    sides = set()
    for seed in range(8):
        for split in (
            find_split(folder, seed=seed, val_fraction=0.4, stacks=True),
            find_items(labelled, [SEMANTIC], seed=seed, val_fraction=0.4, stacks=True),
        ):
            parts = [[own.stem for own in part] for part in (split.train, split.val)]
            files = [{file_of(own.image).stem for own in part} for part in (split.train, split.val)]
            assert not files[0] & files[1] and len(files[1]) == 2
            names = [f"v0.tif[{i}]" for i in range(3)] + [f"v1.npy[{i}]" for i in range(2)]
            names += ["v2"] + [f"v3.npy[{i}]" for i in range(4)]
            assert sorted([*parts[0], *parts[1]]) == sorted(names)
            sides.add(frozenset(files[1]))
    assert len(sides) > 1


def test_parts_that_are_given_and_what_is_scored(tmp_path):
    for part in ("train", "val"):
        fill_with_stacks(tmp_path / part, (2, 3))
    split = find_split(tmp_path, stacks=True)
    assert (len(split.train), len(split.val)) == (5, 5)
    assert [pair.stem for pair in find_scored(tmp_path, stacks=True)] == [p.stem for p in split.val]
    assert all(pair.image.parent.parent.name == "val" for pair in split.val)


def test_each_slice_holds_its_page(folder, labelled):
    for pair in (*(split := find_split(folder, stacks=True)).train, *split.val):
        number, index = int(pair.stem[1]), getattr(pair.image, "index", 0)
        image, labels = volume(number, (3, 2, 1, 4)[number])
        np.testing.assert_array_equal(read_image(pair.image)[..., 0], image[index])
        np.testing.assert_array_equal(read_mask(pair.mask), 255 * (labels[index] > 0))
        values = read_values(pair.mask, 1)
        np.testing.assert_array_equal(values[..., 0], 255 * (labels[index] > 0))
    check_pairs((*split.train, *split.val))
    items = find_items(labelled, INSTANCES, stacks=True)
    for item in (*items.train, *items.val):
        number, index = int(item.stem[1]), getattr(item.image, "index", 0)
        labels = volume(number, (3, 2, 1, 4)[number])[1]
        for path in item.targets.values():
            np.testing.assert_array_equal(read_labels(path), labels[index])
    check_items((*items.train, *items.val), INSTANCES)


def test_other_files_are_single_images_beside_stacks(tmp_path):
    fill_with_stacks(tmp_path, (2,))
    image, labels = volume(9, 1)
    Image.fromarray(image[0]).save(tmp_path / "images/one.png")
    Image.fromarray(labels[0]).save(tmp_path / "masks/one.png")
    split = find_split(tmp_path, stacks=True, val_fraction=0.5)
    assert {pair.stem for pair in (*split.train, *split.val)} == {"v0.tif[0]", "v0.tif[1]", "one"}


def test_without_the_option_stacks_are_refused_by_sentences_that_name_it(folder):
    with pytest.raises(ValueError, match=r"v1\.npy is not a .*--stacks to read arrays"):
        find_split(folder)
    with pytest.raises(ValueError, match=r"v0\.tif holds 3 frames; .* give --stacks, which"):
        read_image(folder / "images/v0.tif")
    with pytest.raises(ValueError, match=r"image .*v1\.npy is an array; give --stacks"):
        read_image(folder / "images/v1.npy")


def test_one_stack_cannot_be_split(tmp_path):
    fill_with_stacks(tmp_path, (4,))
    with pytest.raises(ValueError, match=r"holds 1 image; .* one stack .* cut it in two"):
        find_split(tmp_path, stacks=True)


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_numbers_of_slices_must_agree(tmp_path, suffix):
    fill_with_stacks(tmp_path, (3, 2))
    (tmp_path / "masks/v0.tif").unlink()
    write_stack(tmp_path / f"masks/v0{suffix}", volume(0, 2)[1])
    said = rf"image .*v0\.tif has 3 slices but mask .*v0\{suffix} has 2; "
    with pytest.raises(ValueError, match=said):
        find_split(tmp_path, stacks=True)
    with pytest.raises(ValueError, match=said):
        find_items(tmp_path, [SEMANTIC], stacks=True)


def test_sentences_name_the_slice(labelled, tmp_path):
    split = find_split(labelled, stacks=True)
    with pytest.raises(ValueError, match=r"mask .*masks/v\d\.(tif|npy)\[\d\] holds 3 values"):
        check_pairs((*split.train, *split.val))
    fill_with_stacks(tmp_path, (2, 2))
    write_stack(tmp_path / "masks/v0.tif", np.zeros((2, 40, 47), np.uint8))
    split = find_split(tmp_path, stacks=True)
    with pytest.raises(ValueError, match=r"v0\.tif\[0\] is 47x40 .* image .*v0\.tif\[0\] is 48x40"):
        check_pairs((*split.train, *split.val))


def page(value: int, kind: int = 0, size: tuple[int, int] = (3, 4), bits: int = 8) -> Picture:
    pixels = [[[value]] * size[1] for _ in range(size[0])]
    return Picture(pixels, bits, "u", {254: (4, [kind]), 262: (3, [4 if kind & 4 else 1])})


def test_reduced_pages_are_no_slices_and_mask_pages_hide_their_own(tmp_path):
    path = tmp_path / "a.tif"
    hide = page(0, 4)
    hide.samples[0] = [[255]] * 4
    small = page(9, 1, (2, 2))
    write_tiff(path, [page(50), small, hide, page(60), small, page(70, 2)])
    slices = image_slices(path)
    assert [own.name for own in slices] == ["a.tif[0]", "a.tif[1]", "a.tif[2]"]
    for own, value in zip(slices, (50, 60, 70), strict=True):
        assert set(read_mask(own).ravel()) == {value}
    seen = [read_image(own)[..., 0] for own in slices]
    assert (seen[0][0] == 50).all() and (seen[0][1:] == 0).all()
    assert (seen[1] == 60).all() and (seen[2] == 70).all()


def test_thumbnails_in_sub_directories_are_no_slices(tmp_path):
    image = volume(0, 3, 32, 32)[0]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for own in image:
            file.write(own, subifds=1, photometric="minisblack")
            file.write(own[::2, ::2], subfiletype=1, photometric="minisblack")
    slices = image_slices(tmp_path / "a.tif")
    assert len(slices) == 3
    for own, values in zip(slices, image, strict=True):
        np.testing.assert_array_equal(read_mask(own), values)


def test_pages_of_other_sizes_are_refused(tmp_path):
    write_tiff(tmp_path / "a.tif", [page(1), page(2), page(3, 0, (2, 2))])
    with pytest.raises(
        ValueError, match=r"a\.tif has pages of different sizes: 4x3 .* a\.tif\[2\], 2x2"
    ):
        image_slices(tmp_path / "a.tif")


def test_a_stack_of_one_page_is_an_image(tmp_path):
    path = write_stack(tmp_path / "a.tif", volume(0, 1)[0])
    assert image_slices(path) == mask_slices(path) == (path,)
    array = write_stack(tmp_path / "a.npy", volume(0, 1)[0])
    assert image_slices(array) == (Slice(array, 0),)
    np.testing.assert_array_equal(read_image(Slice(array, 0)), read_image(path))


def test_pages_and_arrays_may_have_colours(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3)).astype(np.uint8)
    for name in ("a.tif", "a.npy"):
        slices = image_slices(write_stack(tmp_path / name, colours))
        assert len(slices) == 2
        for own, values in zip(slices, colours, strict=True):
            np.testing.assert_array_equal(read_image(own), values)


def imagej(path, image, **more):
    tifffile.imwrite(path, image, imagej=True, metadata=more)


def ome(path, image, **more):
    tifffile.imwrite(path, image, ome=True, photometric="minisblack", metadata=more)


def shaped(path, image, **more):
    tifffile.imwrite(path, image, photometric="minisblack", metadata=more)


@pytest.mark.parametrize("write", [imagej, ome, shaped])
def test_channels_on_pages_are_no_slices(tmp_path, write):
    path, image = tmp_path / "a.tif", volume(0, 6)[0]
    write(path, image, axes="ZYX")
    slices = image_slices(path)
    assert len(slices) == 6
    np.testing.assert_array_equal(read_mask(slices[4]), image[4])
    write(path, image.reshape(3, 2, *image.shape[1:]), axes="TZYX")
    assert len(image_slices(path)) == 6
    write(path, image.reshape(3, 2, *image.shape[1:]), axes="ZCYX")
    with pytest.raises(ValueError, match=r"a\.tif holds 2 channels as separate pages"):
        image_slices(path)


def test_samples_of_a_page_are_no_channels_on_pages(tmp_path):
    colours = np.zeros((4, 5, 6, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", colours, ome=True, metadata={"axes": "ZYXS"})
    assert len(image_slices(tmp_path / "a.tif")) == 4


@pytest.mark.parametrize(
    "shape, image, mask",
    [
        pytest.param((7, 9), 1, 1, id="grey"),
        pytest.param((7, 9, 3), 1, None, id="colour"),
        pytest.param((3, 7, 9), 3, 3, id="three"),
        pytest.param((4, 7, 9), 4, 4, id="four"),
        pytest.param((5, 7, 9, 3), 5, None, id="colours"),
        pytest.param((7, 9, 4), None, None, id="alpha"),
        pytest.param((7, 9, 1), None, None, id="one-channel"),
        pytest.param((7, 9, 2), None, None, id="two-channels"),
        pytest.param((5, 7, 9, 1), None, None, id="last-one"),
        pytest.param((9,), None, None, id="line"),
        pytest.param((0, 7, 9), None, None, id="empty"),
    ],
)
def test_axes_of_arrays(tmp_path, shape, image, mask):
    """A last axis of 3 is colours in images; the first of three axes is that of slices."""
    path = tmp_path / "a.npy"
    np.save(path, np.ones(shape, np.uint8))
    for slices, expected in ((image_slices, image), (mask_slices, mask)):
        if expected is None:
            with pytest.raises(ValueError, match=r"a\.npy has the shape \(.*\); expected \(height"):
                slices(path)
        else:
            assert [own.name for own in slices(path)] == [f"a.npy[{i}]" for i in range(expected)]


def test_arrays_of_measured_values_have_channels_last(tmp_path):
    values = np.arange(2 * 3 * 4 * 2.0).reshape(2, 3, 4, 2)
    np.save(tmp_path / "a.npy", values)
    for own, expected in zip(mask_slices(tmp_path / "a.npy", 2), values, strict=True):
        np.testing.assert_array_equal(read_values(own, 2), expected)


@pytest.mark.parametrize("dtype", ["bool", ">u2", "i4", "f4"])
def test_array_types_are_scaled_as_those_of_tiff(tmp_path, dtype):
    values = np.arange(2 * 40 * 48).reshape(2, 40, 48) % 777
    values = (values > 300 if dtype == "bool" else values).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    own = values if dtype == "bool" else values.astype(np.dtype(dtype).newbyteorder("="))
    for i, source in enumerate(image_slices(tmp_path / "a.npy")):
        if dtype == "bool":
            Image.fromarray(own[i]).save(tmp_path / "a.tif")
        else:
            tifffile.imwrite(tmp_path / "a.tif", own[i])
        options = ImageOptions(range=(0, 700) if dtype != "bool" else "auto")
        np.testing.assert_array_equal(
            read_image(source, options), read_image(tmp_path / "a.tif", options)
        )
    np.save(tmp_path / "a.npy", np.ones((2, 3, 4), complex))
    with pytest.raises(ValueError, match=r"image .*a\.npy\[1\] holds complex128; expected whole"):
        read_image(Slice(tmp_path / "a.npy", 1))


def test_one_slice_is_read_not_the_volume(tmp_path, monkeypatch):
    size = 256 * 256
    slow = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint16, (200, 256, 256))
    slow[150] = 7
    del slow
    tifffile.imwrite(tmp_path / "a.tif", np.full((200, 256, 256), 7, np.uint16))
    decoded = []
    stored = image_files.stored_samples
    monkeypatch.setattr(
        image_files, "stored_samples", lambda *given: decoded.append(given[2]) or stored(*given)
    )
    for name in ("a.npy", "a.tif"):
        tracemalloc.start()
        assert (read_mask(Slice(tmp_path / name, 150)) == 7).all()
        assert tracemalloc.get_traced_memory()[1] < 10 * 2 * size  # of 200
        tracemalloc.stop()
    assert decoded == [150]


def test_a_file_that_lost_slices_since(tmp_path):
    for name in ("a.tif", "a.npy"):
        path = write_stack(tmp_path / name, volume(0, 2)[0])
        for read in (read_image, read_mask):
            with pytest.raises(ValueError, match=r"it has 2 slices, and 5 is not one of them"):
                read(Slice(path, 5))


def test_a_file_that_was_written_anew_since(tmp_path):
    for count in (2, 4):
        path, image = tmp_path / "a.tif", volume(count, count)[0]
        write_stack(path, image)
        np.testing.assert_array_equal(read_mask(Slice(path, count - 1)), image[-1])


def test_fingerprints_are_of_whole_files(folder, tmp_path):
    split = find_split(folder, stacks=True)
    found = of_pairs({"train": split.train, "val": split.val})
    assert sorted(name.split("/")[1] for name in found) == ["v0", "v1", "v2", "v3"]
    pair = next(own for own in (*split.train, *split.val) if own.stem == "v0.tif[0]")
    image = volume(0, 3)[0]
    image[2, 0, 0] += 1
    other = write_stack(tmp_path / "v0.tif", image)
    changed = replace(pair, image=Slice(other, 0))
    assert of_pairs({"a": [pair]}) != of_pairs({"a": [changed]})
