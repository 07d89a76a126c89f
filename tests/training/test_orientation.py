# SPDX-License-Identifier: Apache-2.0
"""Orientation tags of TIFF files: every value, for codecs of both decoders."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from samfast.training.images import read_image, read_mask, read_values

BITS = np.random.default_rng(0).random((24, 40)) > 0.5
COLOURS = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def seen(stored: Image.Image, orientation: int) -> np.ndarray:
    """What Pillow makes of the stored picture, without a file in between."""
    stored = stored.copy()
    stored.getexif()[274] = orientation
    return np.asarray(ImageOps.exif_transpose(stored))


@pytest.mark.parametrize("codec", [None, "tiff_lzw", "jpeg", "group4", "group3"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_of_every_codec_are_turned_once(tmp_path, codec, orientation):
    path = tmp_path / "a.tif"
    mask = Image.fromarray(BITS if codec != "jpeg" else BITS.repeat(8, 0).repeat(8, 1))
    if codec == "jpeg":
        mask = mask.convert("L")
    mask.save(path, compression=codec, tiffinfo={274: orientation})
    assert np.array_equal(read_mask(path), seen(mask, orientation))
    assert read_values(path, 1).shape == (*seen(mask, orientation).shape, 1)
    if not (codec or "").startswith("group"):
        mask = Image.fromarray(COLOURS)
        mask.save(path, compression=codec)
        with Image.open(path) as image:
            stored = image.convert("RGB")
        mask.save(path, compression=codec, tiffinfo={274: orientation})
        assert np.array_equal(read_image(path), seen(stored, orientation))
    else:
        shown = seen(mask.convert("RGB"), orientation)
        assert np.array_equal(read_image(path), shown)
