import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from utils.errors import UserError
from utils.formats import (
    KEEPABLE,
    TIFF_TAGS,
    UPRIGHT,
    Picture,
    announced_pixels,
    png_chunk,
    read_picture,
    to_grey,
    write_picture,
)

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


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_texts_of_png_are_kept(tmp_path, dtype):
    path, texts = tmp_path / "a.png", {"Title": "Rain", "Description": "Regen \N{UMBRELLA}", "Empty": ""}
    write_picture(path, Picture(noise(8, 9, 3, dtype=dtype), metadata={"text": texts}))
    picture = read_picture(path)
    assert picture.metadata == {"text": texts}
    write_picture(path, picture)
    with Image.open(path) as file:
        assert file.text == texts


def test_stale_profiles_among_the_texts_of_png_are_not_kept(tmp_path):
    texts = {"Raw profile type exif": f"\nexif\n{len(exif(Orientation=6))}\n{exif(Orientation=6).hex()}\n"}
    write_picture(tmp_path / "a.png", Picture(COLOUR, metadata={"text": texts}))
    picture = read_picture(tmp_path / "a.png")
    assert picture.pixels.shape == COLOUR.swapaxes(0, 1).shape
    write_picture(tmp_path / "b.png", picture)
    assert np.array_equal(read_picture(tmp_path / "b.png").pixels, picture.pixels)


def test_comments_of_jpeg_are_kept(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg", comment=b"rain")
    for ending in (".jpg", ".png", ".tif", ".webp", ".bmp"):
        write_picture(tmp_path / f"b{ending}", read_picture(tmp_path / "a.jpg"))
    assert read_picture(tmp_path / "b.jpg").metadata["comment"] == b"rain"


def test_camera_date_and_author_are_kept_in_16_bit_tiff(tmp_path):
    data = Image.Exif()
    data.update({tag: f"of {tag}" for tag in TIFF_TAGS} | {0x0132: "2025:06:07 08:09:10"})
    write_picture(tmp_path / "a.tif", Picture(noise(8, 9, 3), metadata={"exif": data.tobytes()}))
    write_picture(tmp_path / "b.tif", read_picture(tmp_path / "a.tif"))
    with Image.open(tmp_path / "b.tif") as file:
        assert {tag: file.getexif()[tag] for tag in TIFF_TAGS} == dict(data)
    write_picture(tmp_path / "c.tif", Picture(noise(8, 9, 3)))
    assert "exif" not in read_picture(tmp_path / "c.tif").metadata


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
    (tmp_path / "a.ppm").write_bytes(b"P6\n12 10\n65535\n" + colour.astype(">u2").tobytes())
    (tmp_path / "b.ppm").write_text(f"P3\n12 10\n65535\n{' '.join(map(str, colour.ravel()))}\n")
    cv2.imwrite(str(tmp_path / "g.png"), grey)
    (tmp_path / "g.pgm").write_bytes(b"P5\n12 10\n65535\n" + grey.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "a.ppm", "b.ppm"):
        assert np.array_equal(read_picture(tmp_path / name).pixels, colour), name
    for name in ("g.png", "g.pgm"):
        picture = read_picture(tmp_path / name)
        assert picture.grey and np.array_equal(picture.pixels[..., 1], grey), name


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [12, 16])
def test_jpeg_2000_of_more_than_8_bits_is_read(tmp_path, channels, bits):
    pixels = noise(80, 90, channels) >> (16 - bits)
    written = pixels[..., [2, 1, 0, 3][:channels]] if channels > 1 else pixels
    written = written + np.uint16(2**15 - 2 ** (bits - 1))  # fewer bits around the same middle have the same code
    content = bytearray(cv2.imencode(".jp2", written, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1].tobytes())
    start = content.index(b"\xff\x4f\xff\x51") + 42
    content[start : start + 3 * channels : 3] = bytes([bits - 1] * channels)
    (tmp_path / "a.jp2").write_bytes(content)
    picture = read_picture(tmp_path / "a.jp2")
    assert picture.pixels.dtype == np.uint16 and picture.grey == (channels == 1)
    expected = pixels * (65535 / (2**bits - 1))
    assert np.abs(picture.pixels - expected[..., :3]).max() < 2 ** (16 - bits)  # Pillow shifts grey
    assert channels < 4 or np.abs(picture.alpha - expected[..., 3]).max() < 1


def test_white_of_a_ppm_file_stays_white(tmp_path):
    colour = noise(10, 12, 3) % 1024
    (tmp_path / "a.ppm").write_bytes(b"P6 12 10 1023\n" + colour.astype(">u2").tobytes())
    assert np.abs(read_picture(tmp_path / "a.ppm").pixels - colour * (65535 / 1023)).max() <= 0.5


def write_tiff(path, pixels, apart=False, **options):
    """H×W×1 to 4, with its channels together or apart."""
    options = {"photometric": "rgb" if pixels.shape[2] > 2 else "minisblack", "metadata": None, **options}
    if apart:
        tifffile.imwrite(path, np.moveaxis(pixels, 2, 0).copy(), planarconfig="separate", **options)
    else:
        tifffile.imwrite(path, pixels, planarconfig="contig", **options)


def packed(values, bits):
    """H×W -> its rows as a TIFF file stores them uncompressed."""
    planes = (values[..., None] >> np.arange(bits)[::-1]) & 1
    return b"".join(np.packbits(row).tobytes() for row in planes.astype(np.uint8).reshape(len(values), -1))


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16])
def test_white_of_a_grey_tiff_file_stays_white(tmp_path, bits, white_is_zero):
    grey = noise(10, 12) >> (16 - bits)
    content = packed(grey, bits) if bits < 16 else grey.astype("<u2").tobytes()
    tags = {256: 12, 257: 10, 258: bits, 259: 1, 262: 0 if white_is_zero else 1}
    tags |= {273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 10, 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, 9) + entries + bytes(4) + content)
    if bits == 12 and white_is_zero:
        with pytest.raises(UserError, match=r"save it as RGB with 8 or 16 bits"):
            read_picture(tmp_path / "a.tif")
        return
    picture, expected = read_picture(tmp_path / "a.tif"), grey / (2**bits - 1)
    assert picture.grey and picture.pixels.dtype == (np.uint16 if bits > 8 else np.uint8)
    shown = picture.pixels[..., 0] / np.iinfo(picture.pixels.dtype).max
    assert np.abs(shown - (1 - expected if white_is_zero else expected)).max() < 1e-5


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("channels, extra", [(2, [2]), (3, []), (4, [2])])
def test_16_bit_tiff_of_all_layouts_is_read(tmp_path, channels, extra, apart, compression):
    pixels = noise(10, 12, channels)
    turned = [(274, "H", 1, 6, True)]
    write_tiff(tmp_path / "a.tif", pixels, apart, extrasamples=extra, compression=compression, extratags=turned)
    picture, pixels = read_picture(tmp_path / "a.tif"), np.rot90(pixels, -1)
    assert picture.pixels.dtype == np.uint16 and picture.grey == (channels == 2)
    assert np.array_equal(picture.pixels, pixels[..., :3] if channels > 2 else pixels[..., :1].repeat(3, axis=2))
    assert picture.alpha is None if channels == 3 else np.array_equal(picture.alpha, pixels[..., -1])


def test_16_bit_grey_with_alpha_of_png_is_read(tmp_path):
    pixels = noise(10, 12, 2)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 12, 10, 16, 4, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    picture = read_picture(tmp_path / "a.png")
    assert picture.grey and np.array_equal(picture.alpha, pixels[..., 1])
    assert np.array_equal(picture.pixels, pixels[..., :1].repeat(3, axis=2))


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_16_bit_grey_with_alpha_stays_without_colour(tmp_path, ending):
    picture = Picture(noise(10, 12, 3), grey=True, alpha=noise(10, 12))
    write_picture(tmp_path / f"a{ending}", picture)
    again = read_picture(tmp_path / f"a{ending}")
    assert np.array_equal(again.pixels, to_grey(picture.pixels)[..., None].repeat(3, axis=2))
    assert np.array_equal(again.alpha, picture.alpha)


def test_metadata_of_16_bit_grey_with_alpha_are_kept(tmp_path):
    tags = [(0x010F, "s", 0, "Camera", True), (700, "B", len(XMP), XMP, True)]
    write_tiff(tmp_path / "a.tif", noise(9, 8, 2), extrasamples=[2], iccprofile=PROFILE, extratags=tags)
    metadata = read_picture(tmp_path / "a.tif").metadata
    assert metadata["icc_profile"] == PROFILE and metadata["xmp"] == XMP and b"Camera" in metadata["exif"]


def test_further_channels_are_what_they_say(tmp_path):
    colour, alpha = noise(10, 12, 3), noise(10, 12, 1) // 2 + 30_000
    write_tiff(tmp_path / "a.tif", np.dstack([colour, alpha]), extrasamples=[0])
    assert read_picture(tmp_path / "a.tif").alpha is None
    for channels in (colour, colour[..., :1]):
        multiplied = np.round(channels * (alpha / 65535)).astype(np.uint16)
        write_tiff(tmp_path / "a.tif", np.dstack([multiplied, alpha]), extrasamples=[1])
        picture = read_picture(tmp_path / "a.tif")
        assert np.abs(picture.pixels - channels.astype(int)).max() <= 2 and np.array_equal(picture.alpha, alpha[..., 0])


def test_where_no_library_reads_16_bits_the_upper_8_are_kept(tmp_path, monkeypatch, caplog):
    pixels = noise(10, 12, 3)
    write_tiff(tmp_path / "a.tif", pixels, apart=True, compression="zlib")

    def lacking(page):
        raise ValueError("requires another package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", lacking)
    with caplog.at_level("INFO"):
        assert np.array_equal(read_picture(tmp_path / "a.tif").pixels, pixels >> 8)
    assert "a.tif: only the upper 8 of its bits were kept" in caplog.text
    write_tiff(tmp_path / "a.tif", pixels, apart=True)  # which Pillow would misread
    with pytest.raises(UserError, match="requires another package"):
        read_picture(tmp_path / "a.tif")


def test_tiff_of_rare_kinds_is_refused(tmp_path, monkeypatch):
    write_tiff(tmp_path / "a.tif", noise(9, 8, 5).astype(np.float16), extrasamples=[0, 0])
    with pytest.raises(UserError, match=r"a.tif .*of a rare kind; save it as RGB"):
        read_picture(tmp_path / "a.tif")
    write_tiff(tmp_path / "a.tif", noise(90, 80, 2), extrasamples=[2])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"a.tif .*too large for its kind"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_colours_of_16_bits_become_alpha(tmp_path, channels):
    pixels = noise(10, 12, channels)
    content = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    chunk = png_chunk(b"tRNS", pixels[3, 4].astype(">u2").tobytes())
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    picture = read_picture(tmp_path / "a.png")
    assert np.array_equal(picture.pixels, np.broadcast_to(pixels, (10, 12, 3)))
    assert (
        np.array_equal(picture.alpha, 65535 * (pixels != pixels[3, 4]).any(axis=2)) and picture.alpha.dtype == np.uint16
    )


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


def test_damaged_metadata_cost_no_colour_profile(tmp_path, caplog):
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg", icc_profile=PROFILE, xmp=b"\xff\xfe")
    write_picture(tmp_path / "a.png", read_picture(tmp_path / "a.jpg"))
    assert read_picture(tmp_path / "a.png").metadata["icc_profile"] == PROFILE
    assert "left away but for the colour profile" in caplog.text


@pytest.mark.parametrize("grey_with_alpha", [False, True])
def test_announced_pixels_are_those_of_the_file(tmp_path, grey_with_alpha):
    pixels = np.zeros((40, 50, 2), np.uint16) if grey_with_alpha else COLOUR
    options = {"photometric": "minisblack", "extrasamples": ["unassalpha"]} if grey_with_alpha else {}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    assert announced_pixels(tmp_path / "a.tif") == read_picture(tmp_path / "a.tif").pixels[..., 0].size
    (tmp_path / "b.tif").write_bytes(b"broken")
    assert announced_pixels(tmp_path / "b.tif") == 0


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


@pytest.mark.parametrize("ending", [".jpg", ".webp", ".bmp", ".avif"])
def test_what_an_ending_cannot_hold_becomes_png(tmp_path, ending, caplog):
    for number, picture in enumerate((Picture(noise(4, 4, 3)), Picture(COLOUR, alpha=COLOUR[..., 0]))):
        caplog.clear()
        write_picture(tmp_path / f"{number}{ending}", picture)
        (path,) = tmp_path.glob(f"{number}.*")
        again = read_picture(path)
        if number == 0 or ending in (".jpg", ".bmp"):
            assert path.name == f"{number}{ending}.png" and np.array_equal(again.pixels, picture.pixels)
            assert f"{number}{ending} cannot hold the result" in caplog.text
            assert f"written as {number}{ending}.png" in caplog.text and "metadata" not in caplog.text
        assert (again.alpha is not None) == number


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    write_picture(tmp_path / "bomb.png", Picture(np.zeros((300, 300, 3), np.uint8)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(UserError, match=r"bomb.png is too large to be read at once, or a decompression bomb: test.py"):
        read_picture(tmp_path / "bomb.png")
