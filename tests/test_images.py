import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.files import atomic_write
from utils.images import contact_sheet, find_pictures, read_image, reflect_pad, to_image, to_tensor, write_png

RAMP = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5


def test_png_round_trip_is_exact(tmp_path):
    write_png(tmp_path / "new" / "folder" / "a.png", RAMP)
    assert np.array_equal(read_image(tmp_path / "new" / "folder" / "a.png"), RAMP)


def test_tensor_round_trip_is_exact():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(to_image(to_tensor(image)), image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    Image.fromarray(RAMP).convert(mode).save(tmp_path / "a.tiff")
    image = read_image(tmp_path / "a.tiff")
    assert image.shape == RAMP.shape and image.dtype == np.uint8


def test_16_bits_are_scaled_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for ending in ("png", "tiff"):
        Image.fromarray(grey).save(tmp_path / f"a.{ending}")
        image = read_image(tmp_path / f"a.{ending}")
        assert np.array_equal(image[..., 0], grey >> 8) and np.array_equal(image[..., 0], image[..., 2])


def test_floating_point_pictures_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="floating-point"):
        read_image(tmp_path / "a.tiff")


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90°
    Image.fromarray(RAMP[:3]).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(RAMP[:3], -1))


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp", "tiff"])
def test_truncated_pictures_are_named(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"a.{ending} cannot be read as a picture"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_files_that_are_no_pictures_are_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a.png cannot be read"):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"b.png does not exist"):
        read_image(tmp_path / "b.png")


def test_pictures_are_found_in_files_trees_and_patterns(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "notes.txt", ".hidden.png", "sub/d.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()

    def names(source):
        paths, root = find_pictures(source)
        return [str(path.relative_to(root)) for path in paths]

    assert names(tmp_path) == ["a.jpg", "b.PNG", "sub/c.webp"]
    assert names(tmp_path / "a.jpg") == ["a.jpg"]
    assert names(tmp_path / "*.*") == ["a.jpg", "b.PNG"]
    assert names(f"{tmp_path}/**/*.webp") == ["sub/c.webp"]
    with pytest.raises(UserError, match="an empty name"):
        find_pictures("")
    with pytest.raises(UserError, match="does not exist"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no pictures"):
        find_pictures(f"{tmp_path}/*.txt")


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


def test_interrupted_writes_leave_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.png") as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_files_whose_long_names_begin_alike_are_written_at_the_same_time(tmp_path):
    names = [f"{'雨' * 75}{letter}.png" for letter in "ab"]
    with atomic_write(tmp_path / names[0]) as first, atomic_write(tmp_path / names[1]) as second:
        first.write(b"first")
        second.write(b"second")
    assert [(tmp_path / name).read_bytes() for name in names] == [b"first", b"second"]


def test_folders_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a.png cannot be written .*: free some space or choose another folder"):
        write_png(tmp_path / "file" / "a.png", RAMP)
