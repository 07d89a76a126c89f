# SPDX-License-Identifier: Apache-2.0
"""TIFF files that get a page for each slice."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from samfast.training import label_tiff
from samfast.training.georeference import Georeference, read_georeference
from samfast.training.images import read_mask
from samfast.training.predict_files import Results
from samfast.training.probabilities import key_of
from samfast.training.settings import PredictSettings
from samfast.training.stack_files import Name, StackFiles, write_pages
from samfast.training.stacks import Slice, image_slices
from samfast.training.tasks import TaskSpec

DTYPES = (np.uint8, np.uint16, np.uint32, np.float32)


def written(folder, pages, places=None):
    """A file with these pages, one after the other."""
    path, stack = folder / "a_labels.tif", folder / "a.tif"
    with StackFiles({stack: len(pages)}) as files:
        for i, page in enumerate(pages):
            assert not path.exists()
            files.add(path, Slice(stack, i), page, places[i] if places else None)
    assert list(folder.iterdir()) == [path]
    return path


@pytest.mark.parametrize("big", [False, True], ids=["classic", "big"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_pages_are_what_other_programs_read(tmp_path, monkeypatch, dtype, big):
    monkeypatch.setattr(label_tiff, "_STRIP", 100)  # several strips
    monkeypatch.setattr(label_tiff, "_MOST", 1 if big else 2**32)
    values = np.random.default_rng(0).integers(0, 256, (3, 17, 13)).astype(dtype)
    values = values / dtype(3) if dtype == np.float32 else values
    path = written(tmp_path, values)
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff == big and len(file.series) == 1
        assert file.asarray().dtype == dtype
        np.testing.assert_array_equal(file.asarray(), values)
    for i, own in enumerate(image_slices(path)):
        np.testing.assert_array_equal(read_mask(own), values[i])
    with Image.open(path) as image:
        assert image.n_frames == 3
        if dtype != np.uint32:  # which Pillow does not read
            image.seek(2)
            np.testing.assert_array_equal(np.asarray(image), values[2])


def test_all_pages_have_the_type_that_one_needs(tmp_path):
    values = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    values[1, 0, 0] = 70_000
    places = [Georeference(None, tags={34737: bytes([65 + i])}) for i in range(3)]
    pages = [own.astype(np.uint32 if i == 1 else np.uint16) for i, own in enumerate(values)]
    path = written(tmp_path, pages, places)
    with tifffile.TiffFile(path) as file:
        assert [page.dtype for page in file.pages] == [np.uint32] * 3
        np.testing.assert_array_equal(file.asarray(), values)
        assert [page.tags[34737].value for page in file.pages] == ["A", "B", "C"]


def test_each_page_keeps_the_georeference_of_its_slice(tmp_path):
    places = []
    for i in range(2):
        tags = {33550: (0.5, 0.5, 0.0), 33922: (0.0, 0.0, 0.0, 100.0 + i, 200.0, 0.0)}
        places.append(Georeference((0.5, 0.0, 100.0 + i, 0.0, -0.5, 200.0), tags=tags))
    path = written(tmp_path, np.ones((2, 4, 5), np.uint16), places)
    assert [read_georeference(Slice(path, i)) for i in range(2)] == places
    write_pages(path, np.ones((2, 4, 5), np.float32), places)
    assert read_georeference(path) == places[0]
    assert read_georeference(Slice(path, 1)) == places[1]


@pytest.mark.parametrize("stacked", [True, False], ids=["stack", "single"])
def test_probabilities_keep_the_georeference(tmp_path, stacked):
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 5)).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for i, own in enumerate(image[: 1 + stacked]):
            tags = [(33550, "d", 3, (0.5, 0.5, 0.0), True)]
            tags += [(33922, "d", 6, (0.0, 0.0, 0.0, 100.0 + i, 200.0, 0.0), True)]
            file.write(own, extratags=tags, metadata=None)
    paths = image_slices(tmp_path / "a.tif")
    settings = PredictSettings(
        images=(tmp_path,), adapter=tmp_path, output=tmp_path / "out", probabilities=True
    )
    settings.output.mkdir()
    classes = TaskSpec("cells", kind="semantic", channels=3)
    for specs, ending in (((), ""), ((classes,), "_cells")):
        task = ending[1:]
        made = []
        with (results := Results(settings, specs, paths, False)).stacks:
            for path in paths:
                shown = np.zeros((4, 5, 3), np.uint8)
                maps = {task: np.zeros((4, 5), bool if not specs else np.int64)}
                maps[key_of(task)] = np.full((3 if specs else 1, 4, 5), 0.25, np.float32)
                name = Name("a", path.name if stacked else "a")
                made.append(results.write(name, path, shown, maps))
        for path, own in zip(paths, made, strict=True):
            found = Path((own["tasks"][task] if specs else own)["probability"])
            pages = image_slices(found)
            assert len(pages) == (3 if specs else len(paths))
            pages = pages if specs or not stacked else [pages[path.index]]
            for page in pages:
                assert read_georeference(page) == read_georeference(path) is not None


def test_a_stack_that_is_not_whole_leaves_what_was_there(tmp_path):
    path, stack = tmp_path / "a_labels.tif", tmp_path / "a.tif"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="another file"), StackFiles({stack: 2}) as files:
        files.add(path, Slice(stack, 0), np.ones((4, 5), np.uint16))
        raise OSError("another file")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"before"
