import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from utils.errors import UserError
from utils.formats import KEEPABLE, UPRIGHT, Picture, read_picture, write_picture

RNG = np.random.default_rng(0)
COLOUR = np.stack([*np.mgrid[:240:10, :200:10], np.full((24, 20), 90)], axis=2).astype(np.uint8)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"


def noise(*shape, dtype=np.uint16):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def exif(**tags):
    data = Image.Exif()
    for tag, value in {"Make": "Camera", **tags}.items():
        data[{"Make": 0x010F, "Orientation": 0x0112}[tag]] = value
    return data.tobytes()


@pytest.mark.parametrize("ending", sorted(KEEPABLE))
def test_pictures_survive_reading_and_writing(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    write_picture(path, Picture(COLOUR), quality=100)
    again = read_picture(path)
    assert again.pixels.shape == COLOUR.shape and not again.grey and again.alpha is None
    lossy = ending in (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif")
    assert np.abs(again.pixels.astype(int) - COLOUR).mean() <= (6 if lossy else 0)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
def test_bits_grey_and_alpha_are_kept(tmp_path, ending, dtype, grey, transparent):
    pixels = noise(24, 20, 1, dtype=dtype).repeat(3, axis=2) if grey else noise(24, 20, 3, dtype=dtype)
    picture = Picture(pixels, grey, noise(24, 20, dtype=dtype) if transparent else None, {"icc_profile": PROFILE})
    write_picture(tmp_path / f"a{ending}", picture)
    again = read_picture(tmp_path / f"a{ending}")
    assert again.pixels.dtype == dtype and np.array_equal(again.pixels, pixels)
    assert again.grey == (grey and not (transparent and dtype == np.uint16))
    assert (again.alpha is not None) == transparent and again.metadata["icc_profile"] == PROFILE
    if transparent:
        assert np.array_equal(again.alpha, picture.alpha)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".avif", ".tif"])
def test_metadata_are_kept(tmp_path, ending):
    source = tmp_path / f"a{ending}"
    write_picture(source, Picture(COLOUR, metadata={"icc_profile": PROFILE, "exif": exif(), "xmp": XMP}))
    picture = read_picture(source)
    for result in (tmp_path / f"b{ending}", tmp_path / "c.png"):
        write_picture(result, picture)
        with Image.open(result) as file:
            assert file.info["icc_profile"] == PROFILE and file.getexif()[0x010F] == "Camera"
            assert ending == ".tif" or file.info["xmp"] == XMP


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resolution_and_xmp_are_kept(tmp_path, ending, dtype):
    path = tmp_path / f"a{ending}"
    write_picture(path, Picture(noise(8, 9, 3, dtype=dtype), metadata={"dpi": (300, 300), "xmp": XMP}))
    write_picture(path, read_picture(path))
    with Image.open(path) as file:
        assert file.info["dpi"] == pytest.approx((300, 300), abs=0.1) and file.info["xmp"] == XMP


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_are_turned_upright(tmp_path, orientation, dtype):
    pixels = noise(6, 4, 3, dtype=dtype)
    write_picture(tmp_path / "a.png", Picture(pixels, metadata={"exif": exif(Orientation=orientation)}))
    picture = read_picture(tmp_path / "a.png")
    assert picture.pixels.dtype == dtype and np.array_equal(picture.pixels, UPRIGHT[orientation](pixels))
    write_picture(tmp_path / "b.png", picture)
    assert np.array_equal(read_picture(tmp_path / "b.png").pixels, picture.pixels)
    with Image.open(tmp_path / "b.png") as file:
        assert file.getexif().get(0x0112, 1) == 1 and file.getexif()[0x010F] == "Camera"


def test_16_bit_files_of_other_programs_are_read(tmp_path):
    colour, grey = noise(10, 12, 3), noise(10, 12)
    cv2.imwrite(str(tmp_path / "a.png"), colour[..., ::-1])
    tifffile.imwrite(tmp_path / "a.tif", colour, photometric="rgb")
    cv2.imwrite(str(tmp_path / "g.png"), grey)
    for name in ("a.png", "a.tif"):
        assert np.array_equal(read_picture(tmp_path / name).pixels, colour)
    picture = read_picture(tmp_path / "g.png")
    assert picture.grey and np.array_equal(picture.pixels[..., 1], grey)


def test_transparent_colours_and_palettes_become_alpha(tmp_path, caplog):
    Image.fromarray(COLOUR).save(tmp_path / "a.png", transparency=tuple(map(int, COLOUR[3, 4])))
    assert read_picture(tmp_path / "a.png").alpha[3, 4] == 0 < read_picture(tmp_path / "a.png").alpha[0, 0]
    Image.fromarray(COLOUR).convert("P").save(tmp_path / "b.png", transparency=3)
    with caplog.at_level("INFO"):
        assert read_picture(tmp_path / "b.png").alpha is not None
    assert "mode P was converted to RGB" in caplog.text


def test_only_the_first_frame_is_read(tmp_path, caplog):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with caplog.at_level("INFO"):
        assert read_picture(tmp_path / "a.tif").pixels.max() == 10
    assert "first of its 2 frames" in caplog.text


def test_damaged_metadata_cost_no_picture(tmp_path, caplog):
    for name, damaged in (("exif", b"Exif\0\0broken"), ("icc_profile", b"no profile"), ("xmp", b"\xff\xfe")):
        Image.fromarray(COLOUR).save(tmp_path / f"{name}.jpg", **{name: damaged})
        picture = read_picture(tmp_path / f"{name}.jpg")
        for ending in (".png", ".jpg", ".tif"):
            write_picture(tmp_path / f"{name}{ending}", picture)
            assert read_picture(tmp_path / f"{name}{ending}").pixels.shape == COLOUR.shape
    assert "metadata were left away" in caplog.text


def test_cmyk_is_converted_by_its_profile_or_without(tmp_path):
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    for options in ({}, {"icc_profile": b"no profile"}):
        cmyk.save(tmp_path / "a.jpg", **options)
        picture = read_picture(tmp_path / "a.jpg")
        assert picture.pixels.shape == COLOUR.shape and "icc_profile" not in picture.metadata


def test_colours_that_become_rgb_get_no_alpha_and_lose_their_profile(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(COLOUR).convert("LAB").save(tmp_path / "a.tif", icc_profile=lab)
    picture = read_picture(tmp_path / "a.tif")
    assert picture.alpha is None and "icc_profile" not in picture.metadata and picture.pixels.shape == COLOUR.shape


def test_endings_that_cannot_hold_a_picture_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a.jpg cannot be written: .jpg has no 16 bits"):
        write_picture(tmp_path / "a.jpg", Picture(noise(4, 4, 3)))
    with pytest.raises(UserError, match=r"a.jpg cannot be written as .jpg .*leave --keep_format away"):
        write_picture(tmp_path / "a.jpg", Picture(COLOUR, alpha=COLOUR[..., 0]))
    assert not list(tmp_path.iterdir())


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    write_picture(tmp_path / "bomb.png", Picture(np.zeros((300, 300, 3), np.uint8)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(UserError, match=r"bomb.png cannot be read as a picture .*decompression bomb"):
        read_picture(tmp_path / "bomb.png")
