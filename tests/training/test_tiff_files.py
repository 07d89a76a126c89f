# SPDX-License-Identifier: Apache-2.0
"""TIFF files of every depth, layout, codec and meaning of their samples.

``tiff_cases`` says what each must look like; two writers, one of them packed by hand, lay the same
samples out in many ways.
"""

import itertools

import numpy as np
import pytest
import tifffile
from PIL import Image
from tiff_cases import DEPTHS, GOLDEN, Case, cases, look
from tiff_writer import DEFLATE, LZW, NONE, PACKBITS, How, Picture, write_tiff

from samfast.training.image_options import ImageOptions
from samfast.training.images import read_image, read_mask, read_values

# Every byte order, size of offsets, layout of planes and parts, codec and predictor.
HOWS = [
    How(order, big, planar, tiled, compression, predictor)
    for order, big, planar, tiled in itertools.product("<>", (False, True), (1, 2), (False, True))
    for compression in (NONE, LZW, DEFLATE, PACKBITS)
    for predictor in (1, 2, 3)
]
ALL = cases()


def fits(case: Case, how: How) -> bool:
    """Predictors need whole bytes, the third one floats."""
    depth = DEPTHS[case.depth]
    if how.predictor == 3:
        return depth.kind == "f"
    return how.predictor == 1 or depth.bits in (8, 16, 32, 64)


def hows(case: Case, number: int, count: int) -> list[How]:
    """Some of the ways that fit, others for another number."""
    fitting = [how for how in HOWS if fits(case, how)]
    return [fitting[(number * 7 + i * 41) % len(fitting)] for i in range(count)]


def write(path, case: Case, how: How, samples=None) -> None:
    depth = DEPTHS[case.depth]
    samples = case.samples() if samples is None else samples
    write_tiff(path, [Picture(samples, depth.bits, depth.kind, case.tags())], how)


def array_of(case: Case) -> np.ndarray:
    """(H, W, samples) of the case, or (H, W) of one sample, for tifffile."""
    depth = DEPTHS[case.depth]
    values = np.array(case.samples(), f"{depth.kind}{depth.bits // 8}")
    return values[..., 0] if values.shape[2] == 1 else values


def write_by_tifffile(path, case: Case, number: int) -> bool:
    """False where tifffile cannot write the case."""
    how, depth = case.how, DEPTHS[case.depth]
    names = {0: "miniswhite", 1: "minisblack", 2: "rgb"}
    untagged = how.extra is None and case.layout not in ("black", "white", "rgb")
    if depth.bits not in (8, 16, 32, 64) or how.photometric not in names or untagged:
        return False
    if how.extra is not None and max(how.extra) > 2:
        return False
    values, options = array_of(case), {}
    if values.ndim == 3:
        planar = number % 2 == 0
        options["planarconfig"] = "separate" if planar else "contig"
        values = np.moveaxis(values, -1, 0) if planar else values
    if how.extra is not None:
        options["extrasamples"] = how.extra
    if case.marked:
        options["extratags"] = [(42113, "s", 0, depth.text, True)]
    compression = (None, "zlib", "lzma")[number % 3]
    predictor = compression is not None and number % 4 > 1 and depth.kind != "f"
    tifffile.imwrite(
        path,
        values,
        photometric=names[how.photometric],
        compression=compression,
        predictor=predictor,
        byteorder="<>"[number % 2],
        bigtiff=number % 5 == 0,
        tile=(16, 16) if number % 3 == 1 else None,
        metadata=None,
        **options,
    )
    return True


def test_the_committed_looks_are_those_of_the_cases():
    golden = np.load(GOLDEN)
    shown = [case for case in ALL if case.how.refused is None]
    assert golden["names"].tolist() == [case.name for case in shown]
    assert len(shown) > 200
    assert all(np.array_equal(g, look(c)) for g, c in zip(golden["looks"], shown, strict=True))


@pytest.mark.parametrize("depth", DEPTHS)
def test_images_look_as_their_tags_say(tmp_path, depth):
    golden = np.load(GOLDEN)
    looks = dict(zip(golden["names"].tolist(), golden["looks"], strict=True))
    path = tmp_path / "a.tif"
    for number, case in enumerate(ALL):
        if case.depth != depth:
            continue
        for how in hows(case, number, 2):
            write(path, case, how)
            if case.how.refused is not None:
                with pytest.raises(ValueError, match=case.how.refused):
                    read_image(path)
            else:
                assert np.array_equal(read_image(path), looks[case.name]), (case, how)
        if case.how.refused is None and write_by_tifffile(path, case, number):
            assert np.array_equal(read_image(path), looks[case.name]), (case, "tifffile")


@pytest.mark.parametrize("name", ["u1-black", "u12-rgb_alpha", "u16-rgb_alpha", "f32-rgb_alpha"])
def test_every_way_to_lay_samples_out_gives_the_same(tmp_path, name):
    golden = np.load(GOLDEN)
    expected = golden["looks"][golden["names"].tolist().index(name)]
    case = next(case for case in ALL if case.name == name)
    path = tmp_path / "a.tif"
    for how in HOWS if name.startswith("u16") else HOWS[::5]:
        if fits(case, how):
            write(path, case, how)
            assert np.array_equal(read_image(path), expected), how


@pytest.mark.parametrize("depth", [d for d in DEPTHS if d != "nan"])
def test_masks_give_the_stored_values_at_every_depth(tmp_path, depth):
    about, path = DEPTHS[depth], tmp_path / "m.tif"
    for number, photometric in enumerate((0, 1, None, 4)):
        case = Case(depth, "black", about.no_data is not None)
        rows = case.samples()
        tags = {262: (3, [photometric])} if photometric is not None else {}
        for how in hows(case, number, 3):
            write_tiff(path, [Picture(rows, about.bits, about.kind, tags)], how)
            assert read_mask(path).tolist() == [[px[0] for px in row] for row in rows], how


@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16, 32])
@pytest.mark.parametrize("order", "<>")
def test_fill_order_2_turns_the_bits_of_every_byte_round(tmp_path, bits, order):
    path, rows = tmp_path / "m.tif", [[[n % (1 << bits)] for n in (0, 1, 2, 3, 4, 1000, 77777, 9)]]
    for tiled in (False, True):
        tags = {262: (3, [1]), 266: (3, [2])}
        write_tiff(path, [Picture(rows, bits, "u", tags)], How(order=order, tiled=tiled))
        read = read_mask(path)
        if bits in (8, 16, 32):
            assert np.array_equal(read, tifffile.imread(path).reshape(read.shape))
        packed = "".join(f"{px[0]:0{bits}b}" for px in rows[0])
        if order == "<" and bits > 12:
            continue  # tifffile says
        turned = "".join(packed[i : i + 8][::-1] for i in range(0, len(packed), 8))
        assert read.tolist() == [[int(turned[i * bits : (i + 1) * bits], 2) for i in range(8)]]


def test_masks_of_palettes_and_of_several_samples(tmp_path):
    path = tmp_path / "m.tif"
    for name in ("u4", "u8"):
        case = Case(name, "palette", False)
        write(path, case, How())
        assert read_mask(path).tolist() == [[px[0] for px in row] for row in case.samples()]
    grey = [[[3, 9], [7, 9]]]
    for extra in ([2], [1]):
        tags = {262: (3, [0]), 338: (3, extra)}
        write_tiff(path, [Picture(grey, 16, "u", tags)], How(planar=2))
        assert read_mask(path).tolist() == [[3, 7]]
    for samples, tags, pattern in (
        (grey, {262: (3, [1]), 338: (3, [0])}, "holds 2 bands; save it with one channel"),
        (grey, {262: (3, [1])}, "holds 2 bands"),
        ([[[3, 9], [7, 8]]], {262: (3, [1]), 338: (3, [2])}, "varies in its alpha channel"),
        ([[[3, 3, 3, 0], [7, 7, 7, 1]]], {262: (3, [2])}, "varies in its channel 4"),
        ([[[3, 3, 3], [7, 6, 7]]], {262: (3, [2])}, "a colour image whose channels differ"),
        ([[[3, 3, 3, 3]]], {262: (3, [5])}, "holds inks; save it with one channel"),
    ):
        write_tiff(path, [Picture(samples, 8, "u", tags)])
        with pytest.raises(ValueError, match=rf"mask .*m\.tif {pattern}|m\.tif is {pattern}"):
            read_mask(path)


def test_measured_values_have_none_where_the_file_says_so(tmp_path):
    path = tmp_path / "v.tif"
    for name in ("u16", "i32", "f32", "f64", "nan"):
        case = Case(name, "black", True)
        write(path, case, How(compression=LZW))
        stored = np.array(case.samples(), np.float64)
        none = np.isnan(stored) | (stored == DEPTHS[name].no_data)
        assert none.sum() == 3
        expected = np.where(none, np.nan, stored).astype(np.float32)
        assert np.array_equal(read_values(path, 1), expected, equal_nan=True), name
    write(path, Case("f32", "rgb", True), How(planar=2))
    assert np.isnan(read_values(path, 3)).sum() == 2 * 3 + 1


def test_no_data_without_a_number_and_nothing_but_no_data(tmp_path):
    path, rows = tmp_path / "a.tif", [[[5], [9]]]
    for text, pattern in ((b"none", "GDAL_NODATA tag 'none', which is not a number"),):
        write_tiff(path, [Picture(rows, 16, "u", {262: (3, [1]), 42113: (2, text)})])
        with pytest.raises(ValueError, match=pattern):
            read_image(path)
    for bits in (4, 8, 16):
        write_tiff(path, [Picture([[[5], [5]]], bits, "u", {262: (3, [1]), 42113: (2, b"5")})])
        with pytest.raises(ValueError, match=r"a\.tif has no pixel with a value"):
            read_image(path)
    write_tiff(path, [Picture([[[5], [np.inf]]], 32, "f", {262: (3, [1])})])
    with pytest.raises(ValueError, match=r"a\.tif holds values that are infinite"):
        read_image(path)
    write_tiff(path, [Picture([[[5], [9]]], 16, "u", {262: (3, [1]), 42113: (2, b"-9999")})])
    assert read_image(path)[0, :, 0].tolist() == [0, 255]  # no value of this type


def test_reduced_pages_are_passed_over_and_mask_pages_hide(tmp_path):
    path, tags = tmp_path / "a.tif", {262: (3, [1])}
    full = Picture([[[100], [900], [40000]], [[200], [300], [50000]]], 16, "u", tags)
    small = Picture([[[7]]], 16, "u", {**tags, 254: (4, [1])})
    old = Picture([[[7]]], 16, "u", {**tags, 255: (3, [2])})
    mask = Picture([[[1], [1], [0]], [[1], [1], [0]]], 1, "u", {262: (3, [4]), 254: (4, [4])})
    small_mask = Picture([[[0]]], 1, "u", {262: (3, [4]), 254: (4, [5])})
    low, high = np.percentile([100, 900, 200, 300], (1, 99))
    shown = np.rint(np.clip((np.array([[100, 900], [200, 300]]) - low) / (high - low), 0, 1) * 255)
    for order in "<>":
        pages = [small, full, old, small_mask, mask]
        write_tiff(path, pages, How(order=order, compression=DEFLATE))
        assert np.array_equal(read_image(path)[..., 0], np.pad(shown, ((0, 0), (0, 1))))
        assert read_mask(path).tolist() == [[px[0] for px in row] for row in full.samples]
        assert np.isnan(read_values(path, 1)[..., 0]).tolist() == [[False, False, True]] * 2
    write_tiff(path, [full, small, full])
    with pytest.raises(ValueError, match=r"a\.tif holds 2 frames"):
        read_image(path)
    write_tiff(path, [small])
    assert read_mask(path).tolist() == [[7]]  # nothing else that it could belong to


def test_frames_behind_a_single_page(tmp_path):
    stack = np.zeros((3, 8, 8), np.uint16)
    described = Picture([[[1]]], 8, "u", {262: (3, [1]), 270: (2, b"ImageJ=1.54\nimages=3\n\0")})
    write_tiff(tmp_path / "j.tif", [described])
    tifffile.imwrite(tmp_path / "t.tif", stack, truncate=True, photometric="minisblack")
    for name in ("j", "t"):
        with pytest.raises(ValueError, match=rf"{name}\.tif holds several frames"):
            read_image(tmp_path / f"{name}.tif")


def test_parts_that_a_file_leaves_out_have_no_data(tmp_path):
    path = tmp_path / "a.tif"
    tags = {262: (3, [1]), 42113: (2, b"77\0")}
    write_tiff(path, [Picture([[[10]], [[20]], [[30]], [[40]]], 16, "u", tags)])
    data = bytearray(path.read_bytes())
    at = data.index(bytes.fromhex("1101 0400 0200 0000".replace(" ", "")))  # StripOffsets
    place = int.from_bytes(data[at + 8 : at + 12], "little")
    data[place + 4 : place + 8] = bytes(4)  # of the second strip
    path.write_bytes(data)
    assert read_mask(path).ravel().tolist() == [10, 20, 77, 77]
    assert read_image(path)[:, 0, 0].tolist() == [0, 255, 0, 0]


def test_bands_are_chosen_by_number(tmp_path):
    path = tmp_path / "a.tif"
    for layout in ("four_bands", "four_bands_untagged", "rgb_unspecified"):
        case = Case("u8", layout, False)
        write(path, case, How(planar=2, compression=LZW))
        stored = np.array(case.samples(), np.uint8)
        assert np.array_equal(read_image(path, ImageOptions((4, 2, 1))), stored[..., [3, 1, 0]])
        one = read_image(path, ImageOptions((4,)))
        assert np.array_equal(one, np.repeat(stored[..., [3]], 3, 2))
    with pytest.raises(ValueError, match=r"holds 4 bands, but --bands names band 5"):
        read_image(path, ImageOptions((1, 2, 5)))
    case = Case("u8", "rgb_alpha", False)
    write(path, case, How())
    stored = np.array(case.samples(), np.uint8)
    alpha = np.repeat(stored[..., [3]], 3, 2)  # chosen, it is a band like others
    assert np.array_equal(read_image(path, ImageOptions((4,))), alpha)
    seen = read_image(path, ImageOptions((3, 2, 1)))
    assert np.array_equal(seen, read_image(path)[..., ::-1])  # not chosen, it is alpha
    write(path, Case("u8", "palette", False), How())
    with pytest.raises(ValueError, match="has a palette, whose colours are not bands"):
        read_image(path, ImageOptions((1,)))


def test_range_is_that_of_the_type_or_two_values(tmp_path):
    path = tmp_path / "a.tif"

    def seen(value, bits: int, kind: str, reach, photometric: int = 1) -> int:
        rows = [[[value], [0.5 if kind == "f" else 1]]]
        write_tiff(path, [Picture(rows, bits, kind, {262: (3, [photometric])})])
        return int(read_image(path, ImageOptions(range=reach))[0, 0, 0])

    assert seen(0x8080, 16, "u", "full") == 128
    assert seen(2056, 12, "u", "full") == 128
    assert seen(-128, 8, "i", "full") == 0 and seen(127, 8, "i", "full") == 255
    assert seen(0.2, 32, "f", "full") == 51
    assert seen(30, 16, "u", (10.0, 60.0)) == 102 and seen(99, 16, "u", (10.0, 60.0)) == 255
    assert seen(30, 16, "u", (10.0, 60.0), photometric=0) == 153
    assert seen(200, 8, "u", (0.0, 10.0)) == 200  # 8 bits are brightness as they are
    with pytest.raises(ValueError, match=r"holds floats from 0.5 to 3, whose full range is 0 to 1"):
        seen(3.0, 32, "f", "full")


def test_damaged_and_strange_files_end_in_a_sentence(tmp_path):
    path, tags = tmp_path / "b.tif", {262: (3, [2])}
    rows = [[[x * y % 251 for _ in range(3)] for x in range(9)] for y in range(9)]
    for how in (How(), How(compression=LZW), How(">", True, 2, True, DEFLATE, 2)):
        write_tiff(path, [Picture(rows, 8, "u", tags)], how)
        whole = path.read_bytes()
        damaged = [whole[:n] for n in range(4, len(whole), 61)]
        damaged += [
            whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :] for i in range(4, len(whole), 7)
        ]
        for data in damaged:
            path.write_bytes(data)
            try:
                read_image(path)
            except ValueError as error:
                assert str(error).startswith((f"{path} ", f"image {path} ")), error
    compression = bytes.fromhex("0301 0300 0100 0000")  # the tag, before its value
    for old, new, pattern in (
        (b"\x08\0" * 3, b"\x18\0" * 3, "3 samples of 24 bits, format 1, are not read"),
        (b"\x08\0" * 3, b"\x08\0\x08\0\x10\0", r"its samples have different types \(\(8, 8, 16\)"),
        (compression + b"\1\0", compression + b"\x98\x87", "codec 34712 is not read .*; save it"),
        (compression + b"\1\0", compression + b"\x05\0", r"b\.tif cannot be decoded: "),
    ):
        write_tiff(path, [Picture(rows, 8, "u", tags)])
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        with pytest.raises(ValueError, match=pattern):
            read_image(path)


def test_a_compressed_strip_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    rows = [[[x, y, 0, 0] for x in range(8)] for y in range(8)]
    write_tiff(tmp_path / "a.tif", [Picture(rows, 16, "u", {262: (3, [2])})], How(compression=LZW))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="a segment unpacks to 128 bytes, more than Pillow's lim"):
        read_image(tmp_path / "a.tif")
