# SPDX-License-Identifier: Apache-2.0
"""One file to one array: every format, colour mode and orientation, and damaged files."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from samfast.training.images import read_image, read_mask

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[..., 0]
DEEP = RNG.integers(0, 4096, (6, 9, 3), dtype=np.uint16)  # 12 bits of 16


def percentiles(values: np.ndarray) -> np.ndarray:
    """What 16-bit and float images must become, spelled out."""
    low, high = np.percentile(values.astype(np.float64), (1, 99))
    scaled = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return scaled if values.ndim == 3 else np.stack([scaled] * 3, -1)


def save_png16(path, values: np.ndarray, clear: bytes = b"") -> None:
    """A 16-bit PNG, grey or RGB, which Pillow cannot write. clear: its tRNS chunk."""
    header = struct.pack(">IIBBBBB", *values.shape[1::-1], 16, {2: 0, 3: 2}[values.ndim], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    file = b"\x89PNG\r\n\x1a\n"
    chunks = [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    for kind, data in chunks if clear else chunks[:1] + chunks[2:]:
        file += struct.pack(">I", len(data)) + kind + data
        file += struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(file)


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp"])
def test_lossless_formats_keep_their_bytes(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path)
    assert np.array_equal(read_image(path), RGB)
    Image.fromarray(GREY).save(path)
    assert np.array_equal(read_image(path), np.stack([GREY] * 3, -1))
    assert np.array_equal(read_mask(path), GREY)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_lossy_formats_are_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path)
    assert np.array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))


def test_palette_image_becomes_its_colours_and_palette_mask_its_indices(tmp_path):
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette([0, 0, 0, 9, 8, 7, 200, 100, 50])
    image.save(tmp_path / "p.png")
    expected = np.array([[0, 0, 0], [9, 8, 7], [200, 100, 50]], np.uint8)[indices]
    assert np.array_equal(read_image(tmp_path / "p.png"), expected)
    assert np.array_equal(read_mask(tmp_path / "p.png"), indices)


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 255, 51)  # black: gone, opaque, one fifth
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [255, 0, 204]
    Image.fromarray(np.array([[0, 9]], np.uint8)).save(tmp_path / "t.png", transparency=0)
    assert read_image(tmp_path / "t.png")[0, :, 0].tolist() == [255, 9]


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 0] = 255  # cyan ink alone
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, 0].tolist() == [0, 255, 255]
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "a.jpg", quality=95)
    red, green, blue = read_image(tmp_path / "a.jpg")[4, 4].tolist()
    assert red < 10 and green > 245 and blue > 245


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_tiff_is_scaled_by_percentiles(tmp_path, dtype, channels):
    values = DEEP[..., 0] if channels == 1 else DEEP
    values = values.astype(dtype)
    if dtype == "uint32":
        values = values << np.uint32(20)  # on both sides of what 32 signed bits hold
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb" if channels == 3 else None)
    assert np.array_equal(read_image(tmp_path / "a.tif"), percentiles(values))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_png_keeps_both_bytes(tmp_path, channels):
    values = DEEP[..., 0] if channels == 1 else DEEP
    save_png16(tmp_path / "a.png", values)
    assert np.array_equal(read_image(tmp_path / "a.png"), percentiles(values))
    if channels == 1:
        assert np.array_equal(read_mask(tmp_path / "a.png"), values)


def test_a_transparent_value_of_a_16_bit_png_is_white(tmp_path):
    path, values = tmp_path / "a.png", np.array([[7, 300, 60000], [7, 1000, 300]], np.uint16)
    save_png16(path, values, struct.pack(">H", 7))
    assert np.array_equal(read_mask(path), values)
    low, high = np.percentile(values[values != 7], (1, 99))
    grey = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    assert np.array_equal(read_image(path)[..., 1], np.where(values == 7, 255, grey))
    colours = np.stack([values, values[::-1], np.full_like(values, 9)], -1)
    save_png16(path, colours, struct.pack(">3H", 300, 1000, 9))
    white = (read_image(path) == 255).all(2)
    assert white.tolist() == [[False, True, False], [False, False, False]]


def test_jpeg_in_tiff_with_alpha_says_what_to_do(tmp_path):
    rgba = np.dstack([RGB, GREY])
    for mode in ("RGBA", "LA"):
        Image.fromarray(rgba).convert(mode).save(tmp_path / "a.tif", compression="jpeg")
        with pytest.raises(ValueError, match=r"samples of 8 bits is not read; save it without alp"):
            read_image(tmp_path / "a.tif")


def test_constant_16_bit_image_is_black_and_nan_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((4, 4), 500, np.uint16))
    assert not read_image(tmp_path / "a.tif").any()
    tifffile.imwrite(tmp_path / "b.tif", np.full((4, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"b\.tif has no pixel with a value"):
        read_image(tmp_path / "b.tif")
    with pytest.raises(ValueError, match=r"b\.tif holds values that are not finite"):
        read_mask(tmp_path / "b.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_images_and_masks(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("png", "tif", "jpg"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(RGB).save(path, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(path))
        assert np.array_equal(read_image(path), np.asarray(upright))
    Image.fromarray(GREY).save(tmp_path / "m.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "m.png"))
    assert np.array_equal(read_mask(tmp_path / "m.png"), np.asarray(upright))
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "d.tif", DEEP, photometric="rgb", extratags=tag)
    turned = np.stack(
        [ImageOps.exif_transpose(_with(Image.fromarray(DEEP[..., c]), exif)) for c in range(3)], -1
    )
    assert np.array_equal(read_image(tmp_path / "d.tif"), percentiles(turned))


def _with(image: Image.Image, exif: Image.Exif) -> Image.Image:
    image.getexif()[0x0112] = exif[0x0112]
    return image


def test_one_bit_and_grey_alpha_masks(tmp_path):
    bits = np.array([[0, 1, 1]], np.uint8)
    Image.fromarray(bits.astype(bool)).save(tmp_path / "b.png")
    assert np.array_equal(read_mask(tmp_path / "b.png"), bits)
    opaque = np.stack([bits * 255, np.full_like(bits, 255)], -1)
    Image.fromarray(opaque).save(tmp_path / "la.png")
    assert np.array_equal(read_mask(tmp_path / "la.png"), bits * 255)


def test_rgb_mask_needs_equal_channels_and_constant_alpha(tmp_path):
    same = np.stack([GREY] * 3, -1)
    Image.fromarray(same).save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png"), GREY)
    same[2, 3, 1] ^= 1
    Image.fromarray(same).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is a colour image whose channels differ"):
        read_mask(tmp_path / "b.png")
    rgba = np.concatenate([np.stack([GREY] * 3, -1), GREY[..., None]], -1)
    Image.fromarray(rgba).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png varies in its alpha channel"):
        read_mask(tmp_path / "c.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=r"cut\.\w+ cannot be decoded"):
            read(path)


def test_every_cut_and_many_flips_of_a_png_end_in_a_sentence_or_an_image(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    path = tmp_path / "b.png"
    damaged = [whole[:n] for n in range(0, len(whole) - 12, 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :] for i in range(0, 60)]
    for data in damaged:
        path.write_bytes(data)
        try:
            read_image(path)
        except ValueError as error:
            assert "b.png" in str(error)


def test_empty_foreign_and_missing_files_are_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    Image.fromarray(RGB).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "gif.png")
    for name in ("empty.png", "text.jpg", "gif.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be decoded"):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png is not a regular file"):
        read_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_several_frames_are_refused(tmp_path, suffix):
    frames = [Image.fromarray(np.roll(RGB, i, 0)) for i in range(3)]
    path = tmp_path / f"film.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"film\.\w+ holds 3 frames"):
        read_image(path)


def test_a_phone_photograph_with_a_preview_is_read(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::2, ::2].copy())]
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").shape == RGB.shape


def test_a_decompression_bomb_is_an_error_and_never_a_warning(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "b.tif", DEEP.astype(np.float64), photometric="rgb")
    for limit in (RGB[..., 0].size - 1, RGB[..., 0].size // 3):  # Pillow: warning, error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for name in ("a.png", "b.tif"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(ValueError, match=rf"{name} has more than {limit} pixels"):
                    read_image(tmp_path / name)
