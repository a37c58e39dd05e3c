import contextlib
import os
import struct
import zlib
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from utils import pictures
from utils.files import UserError
from utils.pictures import KEEPABLE, Picture, find_pictures, read_image, read_picture, skipped, write_picture

COLOUR = np.stack([*np.mgrid[:240:10, :200:10], np.full((24, 20), 90)], axis=2).astype(np.uint8)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MAKE, ORIENTATION, EXPOSURE = 0x010F, 0x0112, 0x829A
DEEP = (".png", ".tif")  # formats of 16 bits


def noise(*shape, dtype=np.uint16):
    return np.random.default_rng(shape).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def exif(orientation=1):
    data = Image.Exif()
    data[MAKE], data[ORIENTATION] = "Camera", orientation
    data.get_ifd(0x8769)[EXPOSURE] = 0.5
    return data.tobytes()


def png(width, height, bits, colours, content, *chunks):
    """A PNG file put together by hand."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(content)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows(pixels):
    """Rows of samples as a PNG file of 16 bits stores them."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)


@pytest.mark.parametrize("ending, dtype", [*((e, np.uint8) for e in sorted(KEEPABLE)), *((e, np.uint16) for e in DEEP)])
def test_pictures_and_their_metadata_survive_reading_and_writing(tmp_path, ending, dtype):
    path, pixels = tmp_path / "new" / "folder" / f"a{ending}", COLOUR.astype(dtype)
    alpha = COLOUR[..., 0] if ending in (".webp", ".avif") else None
    picture = Picture(pixels, alpha=alpha, metadata={"icc_profile": PROFILE, "exif": exif()})
    write_picture(path, picture, quality=100)
    again = read_picture(path)
    assert again.pixels.dtype == dtype and not again.grey
    difference = np.abs(pictures.to_channels(again).astype(int) - pictures.to_channels(picture)).mean()
    assert difference <= (0 if ending in (".png", ".bmp", ".tif", ".tiff") else 6)
    if ending != ".bmp":
        write_picture(tmp_path / "b.png", again)
        with Image.open(tmp_path / "b.png") as file:
            assert file.info["icc_profile"] == PROFILE and file.getexif()[MAKE] == "Camera"
            if (ending, dtype) != (".tif", np.uint16):  # which keeps the first directory's texts only
                assert file.getexif().get_ifd(0x8769)[EXPOSURE] == 0.5


@settings(max_examples=60)
@given(
    ending=st.sampled_from(DEEP),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    grey=st.booleans(),
    transparent=st.booleans(),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_bits_grey_and_alpha_are_kept(tmp_path_factory, ending, dtype, grey, transparent, size):
    path = tmp_path_factory.getbasetemp() / f"round_trip{ending}"
    pixels, alpha = noise(*size, 3, dtype=dtype), noise(*size, dtype=dtype) if transparent else None
    write_picture(path, Picture(pixels, grey, alpha, {"icc_profile": PROFILE}))
    again = read_picture(path)
    expected = pixels.mean(axis=2, keepdims=True).round().repeat(3, axis=2) if grey else pixels
    assert again.pixels.dtype == dtype and np.array_equal(again.pixels, expected)
    assert again.grey == (grey and not (transparent and dtype == np.uint16))  # which is written as RGBA
    assert again.alpha is None if alpha is None else np.array_equal(again.alpha, alpha)
    assert again.metadata == {"icc_profile": PROFILE}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending, dtype", [(e, t) for e in DEEP for t in (np.uint8, np.uint16)])
def test_pictures_are_turned_upright(tmp_path, ending, dtype, orientation):
    path, pixels = tmp_path / f"a{ending}", noise(6, 4, 3, dtype=dtype)
    write_picture(path, Picture(pixels, metadata={"exif": exif(orientation)}))
    if (ending, dtype) == (".tif", np.uint16):
        tifffile.imwrite(path, pixels, photometric="rgb", extratags=[(ORIENTATION, "H", 1, orientation, True)])
    stored = Image.fromarray((pixels >> 8).astype(np.uint8) if dtype == np.uint16 else pixels)
    stored.getexif()[ORIENTATION] = orientation
    for _ in range(2):  # once only
        assert read_picture(path).pixels.dtype == dtype
        assert np.array_equal(read_image(path), np.asarray(ImageOps.exif_transpose(stored)))
        write_picture(path, read_picture(path))


def test_16_bit_files_of_other_programs_are_read(tmp_path):
    grey, grey_alpha, colour, colour_alpha = (noise(10, 12, channels) for channels in (1, 2, 3, 4))
    cv2.imwrite(str(tmp_path / "a.png"), colour[..., ::-1])
    cv2.imwrite(str(tmp_path / "lzw.tif"), colour[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    tifffile.imwrite(tmp_path / "alpha.tif", colour_alpha, photometric="rgb", extrasamples=[2], compression="zlib")
    tifffile.imwrite(tmp_path / "extra.tif", colour_alpha, photometric="rgb", extrasamples=[0], byteorder=">")
    cv2.imwrite(str(tmp_path / "g.png"), grey)
    tifffile.imwrite(tmp_path / "g.tif", grey[..., 0], byteorder=">")
    (tmp_path / "g.pgm").write_bytes(b"P5\n12 10\n65535\n" + grey.astype(">u2").tobytes())
    (tmp_path / "la.png").write_bytes(png(12, 10, 16, 4, rows(grey_alpha)))
    contents = {"a.png": colour, "lzw.tif": colour, "alpha.tif": colour_alpha, "extra.tif": colour_alpha[..., :3]}
    contents |= {"g.png": grey, "g.tif": grey, "g.pgm": grey, "la.png": grey_alpha}
    for name, pixels in contents.items():
        picture = read_picture(tmp_path / name)
        assert picture.pixels.dtype == np.uint16 and picture.grey == (pixels.shape[2] < 3), name
        assert np.array_equal(np.atleast_3d(pictures.to_channels(picture)), pixels), name
        assert np.array_equal(read_image(tmp_path / name), picture.pixels >> 8)


def test_kinds_that_are_not_read_are_refused(tmp_path):
    for name, pixels, options in (
        ("planes", noise(3, 10, 12), {"photometric": "rgb", "planarconfig": "separate"}),
        ("grey_alpha", noise(10, 12, 2), {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": [2]}),
        ("premultiplied", noise(10, 12, 4), {"photometric": "rgb", "extrasamples": [1]}),
        ("cmyk", noise(10, 12, 4), {"photometric": "separated"}),
        ("white_is_0", noise(10, 12), {"photometric": "miniswhite"}),
        ("wide", noise(10, 12).astype(np.uint32), {}),
        ("negative", np.full((10, 12), -1, np.int16), {}),
        ("float", np.zeros((10, 12), np.float32), {}),
        ("float_colours", np.zeros((10, 12, 3), np.float16), {"photometric": "rgb"}),
    ):
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, **options)
    (tmp_path / "float.ppm").write_bytes(b"Pf\n12 10\n-1.0\n" + bytes(480))
    transparent = (b"tRNS", noise(3).astype(">u2").tobytes())
    (tmp_path / "colour_key.png").write_bytes(png(12, 10, 16, 2, rows(noise(10, 12, 3)), transparent))
    Image.fromarray(COLOUR).save(tmp_path / "postscript.png", "EPS")  # for which Pillow would start Ghostscript
    assert len(list(tmp_path.iterdir())) == 12
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=rf"{path.name} cannot be read as a picture \(it is .*an unsupported kind"):
            read_picture(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "LAB"])
def test_every_mode_is_read(tmp_path, mode):
    image = Image.fromarray(COLOUR).convert(mode)
    image.save(tmp_path / "a.tif", icc_profile=PROFILE)
    picture = read_picture(tmp_path / "a.tif")
    assert picture.pixels.shape == COLOUR.shape and picture.pixels.dtype == np.uint8
    assert picture.grey == (mode in ("1", "L", "LA")) and (picture.alpha is not None) == (mode in ("LA", "RGBA"))
    assert ("icc_profile" in picture.metadata) == (mode not in ("CMYK", "LAB"))
    if not picture.grey and mode != "P":
        assert np.abs(picture.pixels.astype(int) - np.asarray(image.convert("RGB"))).mean() < 12


def test_transparent_colours_palettes_frames_and_damaged_exif_data(tmp_path, caplog):
    caplog.set_level("INFO")
    image = Image.fromarray(COLOUR)
    image.save(tmp_path / "a.png", transparency=tuple(map(int, COLOUR[3, 4])))
    alpha = read_picture(tmp_path / "a.png").alpha
    assert alpha[3, 4] == 0 < alpha[0, 0] and not caplog.messages
    image.convert("P").save(tmp_path / "b.png", transparency=3)
    assert read_picture(tmp_path / "b.png").alpha is not None
    image.save(tmp_path / "c.tif", save_all=True, append_images=[Image.new("RGB", image.size)])
    assert np.array_equal(read_image(tmp_path / "c.tif"), COLOUR)
    image.save(tmp_path / "d.jpg", exif=b"Exif\0\0broken", icc_profile=PROFILE)
    assert read_picture(tmp_path / "d.jpg").metadata == {"icc_profile": PROFILE}
    palette, frames = caplog.messages
    assert "b.png: mode P was converted to RGBA" in palette and "only the first of its 2 frames" in frames


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    for picture, endings, reason in (
        (Picture(COLOUR), (".gif", ".heic", ""), r"choose .*\.png"),
        (Picture(COLOUR.astype(np.uint16)), (".jpg", ".webp", ".bmp", ".avif"), "holds no 16 bits: write PNG"),
        (Picture(COLOUR, alpha=COLOUR[..., 0]), (".jpg", ".bmp"), "holds no alpha: write PNG"),
        (Picture(np.zeros((1, 16_384, 3), np.uint8)), (".webp",), "write PNG"),  # which is too wide
    ):
        for ending in endings:
            with pytest.raises(UserError, match=rf"a{ending} cannot be written.*{reason}"):
                write_picture(tmp_path / f"a{ending}", picture)
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [16_000, 60_000])  # the latter is refused by Pillow
def test_decompression_bombs_are_refused(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png(side, side, 8, 2, bytes(1000)))
    with pytest.raises(UserError, match=r"bomb.png has more than 250 megapixels: reduce it"):
        read_picture(tmp_path / "bomb.png")


def test_files_that_are_no_pictures_are_named(tmp_path):
    for number, content in enumerate((b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(50), b"II*\0" + bytes(9))):
        (tmp_path / f"{number}.png").write_bytes(content)
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=rf"{path.name} cannot be read as a picture \([^/]*\): convert, replace"):
            read_picture(path)


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged TIFF files
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp", "a.avif", "a.tif", "16_bits.png", "16_bits.tif"])
def test_damaged_pictures_are_read_or_refused_with_a_sentence(tmp_path, name):
    path, pixels = tmp_path / name, noise(40, 48, 3, dtype=np.uint16 if "16" in name else np.uint8)
    write_picture(path, Picture(pixels, metadata={"icc_profile": PROFILE, "exif": exif()}))
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for part in (0.3, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(UserError, match=rf"{name} cannot be read as a picture"):
            read_picture(path)
    for _ in range(120):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 8)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            write_picture(tmp_path / "result.png", read_picture(path))


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_pictures_are_found_in_files_trees_and_patterns(tmp_path, monkeypatch):
    touch(tmp_path, "b.PNG", "a.jpg", "sub/c.webp", "notes.txt", ".hidden.png", ".hidden/d.png", "sub/x.png/e.bmp")
    (tmp_path / "nowhere.png").symlink_to("missing.png")

    def names(source):
        paths, root = find_pictures(source)
        return [str(path.relative_to(root)) for path in paths]

    assert names(tmp_path) == ["a.jpg", "b.PNG", "nowhere.png", "sub/c.webp", "sub/x.png/e.bmp"]
    assert names(tmp_path / "a.jpg") == ["a.jpg"] and names(tmp_path / "notes.txt") == ["notes.txt"]
    assert names(tmp_path / "*.*") == ["a.jpg", "b.PNG", "nowhere.png"]
    assert names(f"{tmp_path}/**/*.webp") == ["sub/c.webp"]
    for source, reason in (("", "without a name"), ("nowhere", "does not exist"), ("*.txt", "holds no pictures")):
        with pytest.raises(UserError, match=reason):
            find_pictures(source and tmp_path / source)
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError("locked")))  # to root, too
    with pytest.raises(PermissionError, match="locked"):
        find_pictures(tmp_path)


def test_results_of_earlier_runs_are_left_out(tmp_path):
    touch(tmp_path, "a.png", "results/a.png", "results/sub/b.png", "results.old/c.png")
    (tmp_path / "link").symlink_to("results")
    originals = [tmp_path / "a.png", tmp_path / "results.old" / "c.png"]
    for source in (tmp_path, tmp_path / "**" / "*.png", tmp_path / "results" / ".."):
        for results in (tmp_path / "results", tmp_path / "link"):
            assert [path.resolve() for path in find_pictures(source, [results])[0]] == originals
    (tmp_path / "a.png").rename(tmp_path / "results" / "a.png")
    (tmp_path / "results.old" / "c.png").unlink()
    with pytest.raises(UserError, match="only results of earlier runs"):
        find_pictures(tmp_path, [tmp_path / "results"])
    for results in (tmp_path, tmp_path.parent, tmp_path / "res"):  # within which no results lie apart
        assert len(find_pictures(tmp_path, [results])[0]) == 2


def test_what_is_skipped_in_a_folder_or_pattern_is_counted(tmp_path):
    assert skipped(tmp_path) == ""
    touch(tmp_path, "a.png", ".DS_Store", "Thumbs.db", "sub/psnr_ssim.csv", "settings.json", ".git/config")
    assert skipped(tmp_path) == ""
    touch(tmp_path, "a.MP4", "sub/b.heic", "sub/c")
    (tmp_path / "link").symlink_to("sub")
    (tmp_path / ".hidden").symlink_to("sub")
    (tmp_path / "round").symlink_to(".")
    assert skipped(tmp_path) == "skipped: 1 clip, 2 files of unknown kind, 2 linked folders"
    assert skipped(tmp_path, [tmp_path / "sub"]) == "skipped: 1 clip, 2 linked folders"
    assert skipped(tmp_path / "a.MP4") == skipped(tmp_path / "*") == skipped(tmp_path / "sub" / "c") == ""
    assert skipped(tmp_path / "sub" / "*") == "skipped: 2 files of unknown kind"


@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (3, 2), (5, 4)])
def test_reflection_pads_any_picture(height, width):
    image = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    padded = pictures.reflect_pad(image, 16, 4)
    assert padded.shape == (16, max(4, width), 3)
    there_and_back = [*range(height), *range(height - 2, 0, -1)]
    assert np.array_equal(padded[:, :width], image[np.resize(there_and_back, 16)])
