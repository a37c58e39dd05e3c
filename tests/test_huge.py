import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from model import MultiscaleNet
from tests.test_formats import PROFILE, exif
from utils import huge
from utils.errors import UserError
from utils.formats import Picture, read_picture, to_grey, write_picture
from utils.huge import derain_huge, is_huge
from utils.inference import Derainer, derain

pytest.importorskip("pyvips", reason="pyvips is not installed: pip install -r requirements-extras.txt")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def derainer():
    torch.manual_seed(0)
    return Derainer(MultiscaleNet(dim=8, num_blocks=(1, 1, 1)), "tile", window=32)


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["colour", "grey", "transparent"])
def test_bands_give_the_same_files(derainer, tmp_path, ending, dtype, kind):
    pixels = noise(75, 90, 1, dtype=dtype).repeat(3, axis=2) if kind == "grey" else noise(75, 90, 3, dtype=dtype)
    alpha = noise(75, 90, dtype=dtype) if kind == "transparent" else None
    source, result = tmp_path / f"a{ending}", tmp_path / "out" / f"a{ending}"
    write_picture(source, Picture(pixels, kind == "grey", alpha, {} if kind == "grey" else {"icc_profile": PROFILE}))
    derain_huge(derainer, source, result, 95)
    picture, again = read_picture(source), read_picture(result)
    expected = derainer(picture.pixels)
    if picture.grey:
        expected = to_grey(expected)[..., None].repeat(3, axis=2)
    assert again.pixels.dtype == dtype and again.grey == picture.grey
    assert again.metadata.get("icc_profile") == (None if kind == "grey" else PROFILE)
    assert np.abs(again.pixels.astype(int) - expected).max() <= 1
    if alpha is not None:
        assert np.array_equal(again.alpha, alpha)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [result.name]


def test_bands_are_upright_and_keep_metadata(derainer, tmp_path):
    write_picture(
        tmp_path / "a.jpg", Picture(noise(60, 80, 3), metadata={"exif": exif(Orientation=6), "dpi": (300, 300)})
    )
    derain_huge(derainer, tmp_path / "a.jpg", tmp_path / "b.png", 95)
    again = read_picture(tmp_path / "b.png")
    assert again.pixels.shape == (80, 60, 3) and b"Camera" in again.metadata["exif"]
    assert again.metadata["dpi"] == pytest.approx((300, 300), abs=0.1)
    difference = again.pixels.astype(int) - derainer(read_picture(tmp_path / "a.jpg").pixels)
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("name, kind", [("a.bmp", "L"), ("a.jpg", "RGBA"), ("a.webp", "I;16"), ("a.jpeg", "I;16")])
def test_what_an_ending_cannot_hold_becomes_png(derainer, tmp_path, name, kind, caplog):
    pixels = noise(40, 50, dtype=np.uint16)
    image = Image.fromarray(pixels) if kind == "I;16" else Image.fromarray((pixels >> 8).astype(np.uint8)).convert(kind)
    image.save(tmp_path / name, "PNG")
    derain_huge(derainer, tmp_path / name, tmp_path / "out" / name, 95)
    (result,) = (tmp_path / "out").iterdir()
    assert result.name == f"{name}.png" and f"{name} cannot hold the result: it is written as {name}.png" in caplog.text
    with Image.open(result) as file:
        assert file.mode == kind


def test_huge_pictures_are_told_from_their_headers(tmp_path, monkeypatch):
    write_picture(tmp_path / "a.png", Picture(noise(30, 40, 3)))
    (tmp_path / "b.png").write_bytes(b"broken")
    assert not is_huge(tmp_path / "a.png") and not is_huge(tmp_path / "b.png")
    monkeypatch.setattr(huge, "HUGE", 30 * 40 - 1)
    assert is_huge(tmp_path / "a.png")


def test_the_library_derains_huge_pictures_the_same_way(narrow_weights, tmp_path, monkeypatch):
    Image.fromarray(noise(40, 50, 4)).save(tmp_path / "a.png")
    files = [tmp_path / "a.png", narrow_weights]
    expected = read_picture(derain(*files, tmp_path / "b.jpg", "cpu", window=32))
    monkeypatch.setattr(huge, "HUGE", 40 * 50 - 1)
    monkeypatch.setattr("utils.inference.read_picture", None)
    output = derain(*files, tmp_path / "c.jpg", "cpu", window=32)
    result = read_picture(output)
    assert output.name == "c.jpg.png"
    np.testing.assert_array_equal(result.alpha, expected.alpha)
    np.testing.assert_array_equal(result.pixels, expected.pixels)


def test_what_fails_is_named_and_leaves_nothing(derainer, tmp_path):
    write_picture(tmp_path / "a.png", Picture(noise(300, 200, 3)))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    Image.fromarray(noise(40, 50, 3)).save(tmp_path / "c.tga")  # a kind that libvips does not read
    for name in ("b.png", "c.tga"):
        with pytest.raises(UserError, match=rf"{name} cannot be derained a band .* save it as PNG, JPEG or TIFF\.$"):
            derain_huge(derainer, tmp_path / name, tmp_path / "out" / "b.png", 95)
    with pytest.raises(UserError, match="too large for --mode whole"):
        derain_huge(Derainer(derainer.net, "whole"), tmp_path / "a.png", tmp_path / "out" / "a.png", 95)
    write_picture(tmp_path / "thin.png", Picture(noise(300, 20, 3)))
    with pytest.raises(UserError, match=r"thin.png is too narrow .* smaller --win_size"):
        derain_huge(derainer, tmp_path / "thin.png", tmp_path / "out" / "thin.png", 95)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        derain_huge(derainer, tmp_path / "a.png", tmp_path / "file" / "a.png", 95)
    assert not list((tmp_path / "out").iterdir())


def test_a_name_may_be_used_again(derainer, tmp_path):
    for ending, turn in ((".tif", {}), (".jpg", {"exif": exif(Orientation=6)})):
        for level in (30, 200):
            write_picture(tmp_path / f"a{ending}", Picture(np.full((40, 50, 3), level, np.uint8), metadata=turn))
            derain_huge(derainer, tmp_path / f"a{ending}", tmp_path / "b.tif", 95)
            expected = derainer(read_picture(tmp_path / f"a{ending}").pixels)
            assert np.abs(read_picture(tmp_path / "b.tif").pixels - expected.astype(float)).max() <= 1


@pytest.mark.parametrize("tile", [None, (128, 128)])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_damaged_tiff_files_are_refused(derainer, tmp_path, tile, compression):
    tifffile.imwrite(tmp_path / "a.tif", noise(600, 500, 3), photometric="rgb", tile=tile, compression=compression)
    content = (tmp_path / "a.tif").read_bytes()
    derain_huge(derainer, tmp_path / "a.tif", tmp_path / "out" / "a.tif", 95)
    damages = [content[: len(content) // 2]]
    if compression:
        damages.append(content[: len(content) // 3] + bytes(len(content) // 3) + content[2 * (len(content) // 3) :])
    for damaged in damages:
        (tmp_path / "b.tif").write_bytes(damaged)
        with pytest.raises(UserError, match=r"b.tif cannot be derained a band at a time"):
            derain_huge(derainer, tmp_path / "b.tif", tmp_path / "out" / "b.tif", 95)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.tif"]


def test_what_libvips_takes_for_rgb_is_refused(derainer, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise(40, 50, 3), photometric="ycbcr", extratags=[(530, "H", 2, (1, 1), True)])
    with pytest.raises(UserError, match=r"a.tif holds colours as YCbCr: save it as RGB"):
        derain_huge(derainer, tmp_path / "a.tif", tmp_path / "b.tif", 95)


@pytest.mark.parametrize("ending", [".webp", ".avif", ".jpg"])
def test_sides_that_a_format_cannot_hold_become_png(derainer, tmp_path, ending, caplog):
    Image.fromarray(noise(32, 16_385 if ending != ".jpg" else 65_501, 3)).save(tmp_path / f"a{ending}", "PNG")
    identity = Derainer(derainer.net, window=32)
    identity.forward = lambda x: x
    output = derain_huge(identity, tmp_path / f"a{ending}", tmp_path / "out" / f"a{ending}", 95)
    assert output.name == f"a{ending}.png" and "cannot hold the result" in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from model import MultiscaleNet
from utils.huge import derain_huge
from utils.inference import Derainer

class Killed(Derainer):
    def stream(self, pictures):
        yield next(super().stream(pictures))
        os.kill(os.getpid(), signal.SIGKILL)

derain_huge(Killed(MultiscaleNet(8, (1, 1, 1)), window=32), Path(sys.argv[1]), Path(sys.argv[2]), 95)
"""


def test_what_a_killed_run_left_is_replaced(derainer, tmp_path):
    write_picture(tmp_path / "a.png", Picture(noise(100, 80, 3)))
    output = tmp_path / "out" / "a.png"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a.png", output], cwd=ROOT, check=False)
        assert len(list(output.parent.iterdir())) == 1 and not output.exists()
    derain_huge(derainer, tmp_path / "a.png", output, 95)
    assert list(output.parent.iterdir()) == [output]


def test_missing_libvips_is_named(derainer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-extras.txt"):
        derain_huge(derainer, tmp_path / "a.png", tmp_path / "b.png", 95)


MEMORY = """
import re, sys, threading, time
from pathlib import Path
import pyvips
from model import MultiscaleNet
from utils.huge import derain_huge
from utils.inference import Derainer

peak = 0

def watch():  # what is not a mapped file, which the system takes back as it likes
    global peak
    while True:
        peak = max(peak, int(re.search(r"RssAnon:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
        time.sleep(0.02)

folder, rows = Path(sys.argv[1]), int(sys.argv[2])
noise = pyvips.Image.black(8000, rows) + 77
noise.cast("uchar").bandjoin([90, 30]).copy(interpretation="srgb").write_to_file(str(folder / "a.tif"))
derainer = Derainer(MultiscaleNet(8, (1, 1, 1)))
threading.Thread(target=watch, daemon=True).start()
derainer.forward = lambda x: x  # memory is that of everything around the network
derain_huge(derainer, folder / "a.tif", folder / "b.tif", 95)
assert pyvips.Image.new_from_file(str(folder / "b.tif")).avg() > 0
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of memory")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for rows in (4_000, 25_000):  # 32 and 200 megapixels
        command = [sys.executable, "-c", MEMORY, str(tmp_path), str(rows)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peaks.append(float(re.search(r"[\d.]+$", run.stdout.strip())[0]))
    assert peaks[1] < peaks[0] + 150, f"MiB: {peaks}"  # 200 megapixels alone take 572 MiB
