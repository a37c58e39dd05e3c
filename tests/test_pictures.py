import errno
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from utils.files import UserError
from utils.pictures import (
    KEEPABLE,
    Picture,
    contact_sheet,
    eight_bits,
    find_pictures,
    read_image,
    read_picture,
    reflect_pad,
    skipped,
    to_channels,
    write_picture,
    write_png,
)

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
COLOUR = np.stack([*np.mgrid[:240:10, :200:10], np.full((24, 20), 90)], axis=2).astype(np.uint8)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MAKE, ORIENTATION, EXPOSURE = 0x010F, 0x0112, 0x829A


def noise(*shape, dtype=np.uint16):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def exif(orientation=None):
    data = Image.Exif()
    data[MAKE] = "Camera"
    if orientation:
        data[ORIENTATION] = orientation
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


def write_tiff(path, pixels, planes="contig", **options):
    """H×W×C, with its channels together or as separate planes."""
    options = {"photometric": "rgb" if pixels.shape[2] > 2 else "minisblack", "metadata": None, **options}
    pixels = np.moveaxis(pixels, 2, 0).copy() if planes == "separate" else pixels
    tifffile.imwrite(path, pixels, planarconfig=planes, **options)


# Reading and writing


@pytest.mark.parametrize("ending", sorted(KEEPABLE))
def test_pictures_survive_reading_and_writing(tmp_path, ending):
    path = tmp_path / "new" / "folder" / f"a{ending}"
    write_picture(path, Picture(COLOUR, metadata={"icc_profile": PROFILE, "exif": exif()}), quality=100)
    again = read_picture(path)
    assert again.pixels.shape == COLOUR.shape and not again.grey and again.alpha is None
    lossless = ending in (".png", ".bmp", ".tif", ".tiff")
    assert np.abs(again.pixels.astype(int) - COLOUR).mean() <= (0 if lossless else 6)
    if ending != ".bmp":
        write_picture(tmp_path / "b.png", again)
        with Image.open(tmp_path / "b.png") as file:
            assert file.info["icc_profile"] == PROFILE and file.getexif()[MAKE] == "Camera"
            assert file.getexif().get_ifd(0x8769)[EXPOSURE] == 0.5


@settings(max_examples=60)
@given(
    ending=st.sampled_from([".png", ".tif"]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    grey=st.booleans(),
    transparent=st.booleans(),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_bits_grey_and_alpha_are_kept(tmp_path_factory, ending, dtype, grey, transparent, size):
    path = tmp_path_factory.getbasetemp() / f"round_trip{ending}"
    pixels = noise(*size, 1, dtype=dtype).repeat(3, axis=2) if grey else noise(*size, 3, dtype=dtype)
    alpha = noise(*size, dtype=dtype) if transparent else None
    write_picture(path, Picture(pixels, grey, alpha, {"icc_profile": PROFILE}))
    again = read_picture(path)
    assert again.pixels.dtype == dtype and np.array_equal(again.pixels, pixels)
    assert again.grey == (grey and not (transparent and dtype == np.uint16))  # which is written as RGBA
    assert again.alpha is None if alpha is None else np.array_equal(again.alpha, alpha)
    assert again.metadata == {"icc_profile": PROFILE}


def test_grey_is_the_mean_of_the_channels(tmp_path):
    picture = Picture(noise(10, 12, 3), grey=True, alpha=noise(10, 12))
    write_picture(tmp_path / "a.png", picture)
    again = read_picture(tmp_path / "a.png")
    assert np.abs(again.pixels[..., 0] - picture.pixels.mean(axis=2)).max() <= 0.5
    assert np.array_equal(to_channels(again)[..., :2], again.pixels[..., :2])


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_metadata_of_16_bit_files_are_kept(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    write_picture(path, Picture(noise(8, 9, 3), metadata={"icc_profile": PROFILE, "exif": exif()}))
    write_picture(path, read_picture(path))
    with Image.open(path) as file:
        assert file.info["icc_profile"] == PROFILE and file.getexif()[MAKE] == "Camera"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending, dtype", [(".png", np.uint8), (".png", np.uint16), (".tif", np.uint8)])
def test_pictures_are_turned_upright(tmp_path, ending, dtype, orientation):
    pixels = noise(6, 4, 3, dtype=dtype)
    write_picture(tmp_path / f"a{ending}", Picture(pixels, metadata={"exif": exif(orientation)}))
    picture = read_picture(tmp_path / f"a{ending}")
    stored = Image.fromarray(eight_bits(pixels))
    stored.getexif()[ORIENTATION] = orientation
    assert picture.pixels.dtype == dtype
    assert np.array_equal(eight_bits(picture.pixels), np.asarray(ImageOps.exif_transpose(stored)))
    write_picture(tmp_path / f"b{ending}", picture)
    assert np.array_equal(read_picture(tmp_path / f"b{ending}").pixels, picture.pixels)
    with Image.open(tmp_path / f"b{ending}") as file:
        assert file.getexif().get(ORIENTATION, 1) == 1 and file.getexif()[MAKE] == "Camera"


def test_16_bit_files_of_other_programs_are_read(tmp_path):
    colour, grey, with_alpha = noise(10, 12, 3), noise(10, 12), noise(10, 12, 2)
    cv2.imwrite(str(tmp_path / "a.png"), colour[..., ::-1])
    cv2.imwrite(str(tmp_path / "lzw.tif"), colour[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    (tmp_path / "a.ppm").write_bytes(b"P6\n12 10\n65535\n" + colour.astype(">u2").tobytes())
    cv2.imwrite(str(tmp_path / "g.png"), grey)
    (tmp_path / "g.pgm").write_bytes(b"P5\n12 10\n65535\n" + grey.astype(">u2").tobytes())
    tifffile.imwrite(tmp_path / "g.tif", 65535 - grey, photometric="miniswhite")
    (tmp_path / "la.png").write_bytes(png(12, 10, 16, 4, rows(with_alpha)))
    for name in ("a.png", "lzw.tif", "a.ppm"):
        assert np.array_equal(read_picture(tmp_path / name).pixels, colour), name
    for name in ("g.png", "g.pgm", "g.tif"):
        picture = read_picture(tmp_path / name)
        assert picture.grey and np.array_equal(picture.pixels[..., 1], grey), name
        assert np.array_equal(read_image(tmp_path / name)[..., 2], grey >> 8)
    picture = read_picture(tmp_path / "la.png")
    assert picture.grey and np.array_equal(picture.pixels[..., 1], with_alpha[..., 0])
    assert np.array_equal(picture.alpha, with_alpha[..., 1])


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("channels, extra", [(2, [2]), (3, []), (4, [2]), (4, [0])])
def test_16_bit_tiff_of_all_layouts_is_read(tmp_path, channels, extra, planes, compression):
    pixels = noise(10, 12, channels)
    tags = [(ORIENTATION, "H", 1, 6, True), (34675, "B", len(PROFILE), PROFILE, True)]
    write_tiff(tmp_path / "a.tif", pixels, planes, extrasamples=extra, compression=compression, extratags=tags)
    picture, pixels = read_picture(tmp_path / "a.tif"), np.rot90(pixels, -1)
    assert picture.pixels.dtype == np.uint16 and picture.grey == (channels == 2)
    assert np.array_equal(picture.pixels, pixels[..., :3] if channels > 2 else pixels[..., :1].repeat(3, axis=2))
    assert np.array_equal(picture.alpha, pixels[..., -1]) if extra == [2] else picture.alpha is None
    assert picture.metadata["icc_profile"] == PROFILE


def test_kinds_that_are_not_read_are_refused(tmp_path):
    write_tiff(tmp_path / "premultiplied.tif", noise(10, 12, 4), extrasamples=[1])
    write_tiff(tmp_path / "grey_premultiplied.tif", noise(10, 12, 2), extrasamples=[1])
    write_tiff(tmp_path / "cmyk.tif", noise(10, 12, 4), photometric="separated")
    write_tiff(tmp_path / "five.tif", noise(9, 8, 5).astype(np.float16), extrasamples=[0, 0])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), -1, np.int32)).save(tmp_path / "negative.tif")
    transparent = (b"tRNS", noise(3).astype(">u2").tobytes())
    (tmp_path / "colour_key.png").write_bytes(png(12, 10, 16, 2, rows(noise(10, 12, 3)), transparent))
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=rf"{path.name} cannot be read as a picture \(it.*; save it"):
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


def test_transparent_colours_and_palettes_become_alpha(tmp_path, caplog):
    caplog.set_level("INFO")
    Image.fromarray(COLOUR).save(tmp_path / "a.png", transparency=tuple(map(int, COLOUR[3, 4])))
    assert read_picture(tmp_path / "a.png").alpha[3, 4] == 0 < read_picture(tmp_path / "a.png").alpha[0, 0]
    assert not caplog.messages
    Image.fromarray(COLOUR).convert("P").save(tmp_path / "b.png", transparency=3)
    assert read_picture(tmp_path / "b.png").alpha is not None
    assert "b.png: mode P was converted to RGBA" in caplog.text


def test_only_the_first_frame_is_read(tmp_path, caplog):
    caplog.set_level("INFO")
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "a.tif").pixels.max() == 10
    assert "only the first of its 2 frames" in caplog.text


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
def test_damaged_metadata_do_not_cost_the_picture(tmp_path, ending, caplog):
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg", exif=b"Exif\0\0broken", icc_profile=PROFILE)
    write_picture(tmp_path / f"a{ending}", read_picture(tmp_path / "a.jpg"))
    assert read_picture(tmp_path / f"a{ending}").metadata == {"icc_profile": PROFILE}
    for dtype in (np.uint8, np.uint16) if ending != ".jpg" else (np.uint8,):
        metadata = {"icc_profile": "no bytes", "exif": b"broken"}
        write_picture(tmp_path / f"b{ending}", Picture(noise(8, 9, 3, dtype=dtype), metadata=metadata))
        assert read_picture(tmp_path / f"b{ending}").metadata == {}
    assert f"b{ending}: written without colour profile and EXIF" in caplog.text


@pytest.mark.parametrize("ending", [".jpg", ".webp", ".bmp", ".avif", ".gif", ".heic", ""])
def test_what_a_format_cannot_hold_is_refused(tmp_path, ending):
    transparent = Picture(COLOUR, alpha=COLOUR[..., 0])
    with pytest.raises(UserError, match=rf"a{ending} cannot be written.*choose .*\.png"):
        write_picture(tmp_path / f"a{ending}", Picture(noise(4, 4, 3)))
    if ending in (".webp", ".avif"):
        write_picture(tmp_path / f"a{ending}", transparent)
        assert read_picture(tmp_path / f"a{ending}").alpha is not None
    else:
        with pytest.raises(UserError, match=rf"a{ending} cannot be written.*choose .*\.png"):
            write_picture(tmp_path / f"a{ending}", transparent)
        assert not any(tmp_path.iterdir())


def test_pictures_too_large_for_a_format_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a.webp cannot be written .*: choose .png"):
        write_png(tmp_path / "a.webp", np.zeros((1, 16_384, 3), np.uint8))


def test_folders_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a.png cannot be written .*: free some space or choose another folder"):
        write_png(tmp_path / "file" / "a.png", COLOUR)


# Hostile files


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(16_000, 16_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png(*size, 8, 2, bytes(1000)))
    with pytest.raises(UserError, match=r"bomb.png has more than 250 megapixels: reduce it"):
        read_picture(tmp_path / "bomb.png")


def test_decompression_bombs_of_rare_kinds_are_refused(tmp_path):
    write_tiff(tmp_path / "a.tif", noise(24, 20, 2), extrasamples=[2])
    content = (tmp_path / "a.tif").read_bytes()
    for tag, side in ((256, 20), (257, 24)):
        content = content.replace(struct.pack("<HHII", tag, 4, 1, side), struct.pack("<HHII", tag, 4, 1, 60_000))
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UserError, match=r"a.tif has more than 250 megapixels"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"II*\0" + bytes(9)])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_files_that_are_no_pictures_are_named(tmp_path, content, ending):
    (tmp_path / f"a{ending}").write_bytes(content)
    with pytest.raises(UserError, match=rf"a{ending} cannot be read as a picture") as caught:
        read_image(tmp_path / f"a{ending}")
    assert str(caught.value).count(str(tmp_path)) == 1


def test_files_that_cannot_be_opened_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"b.png does not exist"):
        read_picture(tmp_path / "b.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("loop.png", "folder.png"):
        with pytest.raises(UserError, match=rf"{name} cannot be read as a picture \([^/]*\): replace or remove it"):
            read_picture(tmp_path / name)


DAMAGED = ["a.png", "a.jpg", "a.bmp", "a.webp", "a.avif", "a.tif", "deep.png", "deep.tif", "grey.tif"]


def write_any(path):
    if path.name == "grey.tif":
        write_tiff(path, noise(40, 48, 2), extrasamples=[2])
    else:
        write_picture(path, Picture(noise(40, 48, 3, dtype=np.uint16 if path.stem == "deep" else np.uint8)))
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged TIFF files
@pytest.mark.parametrize("name", DAMAGED)
def test_truncated_pictures_are_named(tmp_path, name):
    content = write_any(tmp_path / name)
    for part in (0.3, 0.5, 0.9):
        (tmp_path / name).write_bytes(content[: int(len(content) * part)])
        with pytest.raises(UserError, match=rf"{name} cannot be read as a picture"):
            read_picture(tmp_path / name)


def mutations(content, count):
    """Yields damaged copies: a few bytes are others, and some copies are cut off."""
    rng = np.random.default_rng(count)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 8)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        yield bytes(damaged[: rng.integers(len(damaged)) if rng.random() < 0.3 else None])


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged TIFF files
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pictures_are_read_or_refused_with_a_sentence(tmp_path, name):
    outcomes = set()
    for content in mutations(write_any(tmp_path / name), 120):
        (tmp_path / name).write_bytes(content)
        try:
            picture = read_picture(tmp_path / name)
            write_picture(tmp_path / "result.png", picture)
            outcomes.add(picture.pixels.dtype.kind)
        except UserError:
            outcomes.add("refused")
    assert outcomes <= {"u", "refused"} and "refused" in outcomes


# Finding


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_pictures_are_found_in_files_trees_and_patterns(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpg", "sub/c.webp", "notes.txt", ".hidden.png", ".hidden/d.png", "sub/x.png/e.bmp")
    (tmp_path / "nowhere.png").symlink_to("missing.png")

    def names(source, results=()):
        paths, root = find_pictures(source, results)
        return [str(path.relative_to(root)) for path in paths]

    assert names(tmp_path) == ["a.jpg", "b.PNG", "nowhere.png", "sub/c.webp", "sub/x.png/e.bmp"]
    assert names(tmp_path / "a.jpg") == ["a.jpg"] and names(tmp_path / "notes.txt") == ["notes.txt"]
    assert names(tmp_path / "*.*") == ["a.jpg", "b.PNG", "nowhere.png"]
    assert names(f"{tmp_path}/**/*.webp") == ["sub/c.webp"]
    for source, reason in (("", "an empty name"), ("nowhere", "does not exist"), ("*.txt", "holds no pictures")):
        with pytest.raises(UserError, match=reason):
            find_pictures(source and tmp_path / source)


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


def test_what_is_skipped_in_a_folder_is_counted(tmp_path):
    assert skipped(tmp_path) == ""
    touch(tmp_path, "a.png", ".DS_Store", "Thumbs.db", "sub/psnr_ssim.csv", "settings.json", ".git/config")
    assert skipped(tmp_path) == ""
    touch(tmp_path, "a.MP4", "sub/b.heic", "sub/c")
    (tmp_path / "link").symlink_to("sub")
    (tmp_path / ".hidden").symlink_to("sub")
    (tmp_path / "round").symlink_to(".")
    assert skipped(tmp_path) == "skipped: 1 clip, 2 files of unknown kind, 2 linked folders"
    assert skipped(tmp_path, [tmp_path / "sub"]) == "skipped: 1 clip, 2 linked folders"
    assert skipped(tmp_path / "a.MP4") == skipped(tmp_path / "*") == ""


def test_locked_folders_do_not_lose_the_others(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "locked/b.png")
    scandir, locked = os.scandir, str(tmp_path / "locked")

    def refuse(path):  # also to root, who may read everything
        if os.fspath(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", locked)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_pictures(tmp_path)[0] == [tmp_path / "a.png", tmp_path / "locked"]
    with pytest.raises(UserError, match="locked cannot be read as a picture"):
        read_picture(tmp_path / "locked")
    with pytest.raises(PermissionError):
        find_pictures(locked)


# Arrays


@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (3, 2), (5, 4)])
def test_reflection_pads_any_picture(height, width):
    image = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    padded = reflect_pad(image, 16, 4)
    assert padded.shape == (16, max(4, width), 3)
    period = max(1, 2 * (height - 1))
    for y in range(16):
        mirrored = min(y % period, period - y % period) if height > 1 else 0
        assert np.array_equal(padded[y, :width], image[mirrored])


def test_contact_sheet_shows_all_pictures():
    red, blue = np.full((20, 30, 3), (255, 0, 0), np.uint8), np.full((40, 40, 3), (0, 0, 255), np.uint8)
    sheet = contact_sheet([[red, blue], [blue]], border=2)
    assert sheet.shape == (2 + 20 + 2 + 40 + 2, 2 + 30 + 2 + 20 + 2, 3)
    assert (sheet[5, 5] == (255, 0, 0)).all() and (sheet[5, 40] == (0, 0, 255)).all()
    assert (sheet[0] == 255).all() and (sheet[:, -1] == 255).all() and (sheet[30, 46] == 255).all()
