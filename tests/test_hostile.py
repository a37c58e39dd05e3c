"""What people feed to test.py without meaning to, and what becomes of it."""

import errno
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import test as script
from model import MultiscaleNet
from utils.checkpoint import load_checkpoint, load_network
from utils.errors import UserError
from utils.formats import KEEPABLE, Picture, announced_pixels, read_picture, write_picture
from utils.inference import MODES, Derainer

ROOT = Path(__file__).parent.parent
PIXELS = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)


def encoded(kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def bomb():
    """A PNG that claims 60,000×60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            *(
                struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c))
                for n, c in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
            ),
        ]
    )


OUTCOMES = {  # what is there: (its name, how it is made, what becomes of it: a sentence, DERAINED or IGNORED)
    "zero bytes": ("a.png", lambda path: path.touch(), "cannot be read as a picture"),
    "text": ("a.jpg", lambda path: path.write_text("hello"), "cannot be read as a picture"),
    "half a download": ("a.png", lambda path: path.write_bytes(encoded()[:600]), "cannot be read as a picture"),
    "wrong ending": ("a.jpg", lambda path: path.write_bytes(encoded("PNG")), "DERAINED"),
    "wrong ending, alpha in a JPEG": ("a.jpg", lambda path: path.write_bytes(encoded("PNG", "RGBA")), "DERAINED"),
    "rubbish behind the picture": ("a.png", lambda path: path.write_bytes(encoded() + bytes(999)), "DERAINED"),
    "upper-case ending": ("A.PNG", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "unknown ending": ("a.doc", lambda path: path.write_bytes(encoded()), "IGNORED"),
    "hidden file": (".a.png", lambda path: path.write_bytes(encoded()), "IGNORED"),
    "bomb": ("a.png", lambda path: path.write_bytes(bomb()), "a.png"),
    "link to nowhere": ("a.png", lambda path: path.symlink_to("nowhere.png"), "does not exist"),
    "link to itself": ("a.png", lambda path: path.symlink_to("a.png"), "cannot be read as a picture"),
    "folder that links to itself": ("sub", lambda path: path.symlink_to("."), "IGNORED"),
    "folder named like a picture": ("a.png", lambda path: path.mkdir(), "IGNORED"),
    "pipe": ("a.png", os.mkfifo, "IGNORED"),
    "newline in the name": ("a\nb.png", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "leading dash": ("-rf.png", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "other scripts": ("雨 ☔ é.png", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "brackets and stars": ("a[1]*?.png", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "longest name": ("x" * 251 + ".png", lambda path: path.write_bytes(encoded()), "DERAINED"),
    "dots": ("a.b.c..png", lambda path: path.write_bytes(encoded()), "DERAINED"),
}


@pytest.mark.parametrize("options", [(), ("--keep_format",)], ids=["png", "keep_format"])
@pytest.mark.parametrize("situation", OUTCOMES)
def test_hostile_files_beside_a_good_one(tmp_path, narrow_weights, situation, options, capsys):
    name, make, outcome = OUTCOMES[situation]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(encoded())
    make(tmp_path / "in" / name)
    paths = ["--input_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    try:
        script.main([*paths, "--weights", str(narrow_weights), "--win_size", "32", *options])
        said = ""
    except SystemExit as error:
        said = str(error.code)
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    expected = {"good.png"}
    if outcome == "DERAINED":
        kept = name + (".png" if situation == "wrong ending, alpha in a JPEG" else "")
        expected.add(kept if options else str(Path(name).with_suffix(".png")))
    assert written == expected
    assert said == "" if outcome in ("DERAINED", "IGNORED") else name in said and outcome in said


def test_of_broken_files_only_our_sentence_is_printed(tmp_path, narrow_weights):
    """Not what the decoders say on the side."""
    pixels = np.random.default_rng(0).integers(0, 65535, (64, 64, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: len(content) // 2])
    cv2.imwrite(str(tmp_path / "b.tif"), pixels)
    content = (tmp_path / "b.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(content[: len(content) // 2])
    command = [sys.executable, "test.py", "--input_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    run = subprocess.run([*command, "--weights", str(narrow_weights)], cwd=ROOT, capture_output=True, text=True)
    said = [line.strip() for line in run.stderr.splitlines() if line and "picture/s" not in line]
    assert run.returncode == 1 and len(said) == 3, run.stderr
    assert said[0].startswith("error: all is done but for 2 files") and "a.tif cannot" in said[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders_are_named(tmp_path, narrow_weights):
    for folder in ("in", "in/locked"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(encoded())
    (tmp_path / "in" / "a.png").chmod(0)
    (tmp_path / "in" / "locked").chmod(0)
    paths = ["--input_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"a.png cannot be read .*Permission denied[\s\S]*locked cannot be read"):
        script.main([*paths, "--weights", str(narrow_weights)])
    (tmp_path / "in" / "locked").chmod(0o700)


def test_locked_folders_do_not_lose_the_others(tmp_path, narrow_weights, monkeypatch):
    for folder in ("in", "in/locked"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(encoded())
    scandir, locked = os.scandir, str(tmp_path / "in" / "locked")

    def refuse(path):  # also to root, who may read everything
        if os.fspath(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", locked)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    options = ["--weights", str(narrow_weights), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="locked cannot be read as a picture"):
        script.main(["--input_dir", str(tmp_path / "in"), *options])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
    with pytest.raises(SystemExit, match=r"locked cannot be used .Permission denied"):
        script.main(["--input_dir", locked, *options])


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
    mode=st.sampled_from([None, *MODES]),
    window=st.sampled_from([16, 48, 64, 256]),
    batch=st.integers(1, 5),
)
def test_a_network_that_changes_nothing_gives_the_picture_back(height, width, dtype, mode, window, batch):
    rng = np.random.default_rng(height * 1000 + width)
    image = rng.random((height, width, 3), dtype=np.float32)
    if dtype != np.float32:
        image = (image * np.iinfo(dtype).max).astype(dtype)
    derain = Derainer(MultiscaleNet(8, (1, 1, 1)), mode, window)
    derain.forward, derain.batch = lambda x: x, batch
    result = derain(image)
    assert result.dtype == dtype and result.shape == image.shape
    assert np.abs(result.astype(float) - image).max() <= (1e-6 if dtype == np.float32 else 0)


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
    mode=st.sampled_from([None, *MODES]),
    ensemble=st.booleans(),
)
def test_results_are_of_the_same_size_and_type_and_in_range(height, width, dtype, mode, ensemble):
    torch.manual_seed(height)
    image = (np.random.default_rng(width).random((height, width, 3)) * (255 if dtype == np.uint8 else 1)).astype(dtype)
    result = Derainer(MultiscaleNet(8, (1, 1, 1)), mode, 32, ensemble=ensemble)(image)
    assert result.dtype == dtype and result.shape == image.shape
    assert np.isfinite(result).all() and result.min() >= 0
    assert dtype != np.float32 or result.max() <= 1


def mutations(content, count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        broken = bytearray(content)
        for _ in range(rng.integers(1, 8)):
            broken[rng.integers(len(broken))] = rng.integers(256)
        yield bytes(broken[: rng.integers(len(broken)) if rng.random() < 0.3 else None])


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged TIFF files
@pytest.mark.parametrize("ending", sorted(KEEPABLE - {".jpe", ".jfif", ".jpeg", ".tiff"}))
def test_damaged_pictures_are_read_or_refused_with_a_sentence(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    for dtype in (np.uint8, np.uint16) if ending in (".png", ".tif") else (np.uint8,):
        write_picture(path, Picture(PIXELS.astype(dtype) * np.iinfo(dtype).max // 255))
        outcomes = set()
        for content in mutations(path.read_bytes(), 120, seed=len(ending)):
            path.write_bytes(content)
            try:
                outcomes.add(read_picture(path).pixels.dtype.kind)
            except UserError:
                outcomes.add("refused")
        assert outcomes <= {"u", "refused"} and "refused" in outcomes


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged TIFF files
def test_damaged_headers_announce_numbers(tmp_path):
    """Of a kind of TIFF that Pillow does not open."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((40, 56, 2), np.uint16), planarconfig="contig")
    content = (tmp_path / "a.tif").read_bytes()
    width = struct.pack("<HHI", 256, 4, 1)
    assert announced_pixels(tmp_path / "a.tif") == 40 * 56 and width in content
    for damaged in (content.replace(width, struct.pack("<HHI", 256, 3, 2)), *mutations(content[:400], 300, seed=0)):
        (tmp_path / "a.tif").write_bytes(damaged)
        assert isinstance(announced_pixels(tmp_path / "a.tif"), int)


def test_damaged_checkpoints_are_read_or_refused_with_a_sentence(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"epoch": 1, "state_dict": {"a": torch.zeros(3), "b": torch.ones(2, 2)}}, path)
    outcomes = set()
    for content in mutations(path.read_bytes(), 300, seed=0):
        path.write_bytes(content)
        try:
            outcomes.add(type(load_checkpoint(path)).__name__)
        except UserError:
            outcomes.add("refused")
    assert "refused" in outcomes and outcomes <= {"dict", "refused"}


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"num_blocks": (10**9, 1, 1)}, "more blocks than the file has weights"),
        ({"num_blocks": (10**9, -(10**9), 1)}, "more blocks than the file has weights"),
        ({"passes": (1, 10**9, 1)}, "more blocks than the file has weights"),
        ({"num_blocks": (300, 300, 300), "passes": (100, 100, 100)}, "more blocks than the file has weights"),
        ({"num_blocks": (1,)}, "cannot be built"),
        ({"num_blocks": 3}, "cannot be built"),
        ({"dim": -8}, "cannot be built"),
        ({"dim": 10**6}, "does not fit"),
        ({"dim": 10**12}, "cannot be built"),
        ({"heads": (10**6, 10**6, 10**6)}, "does not fit"),
    ],
)
def test_checkpoints_of_networks_that_nobody_can_build_are_refused(tmp_path, options, reason):
    net = MultiscaleNet(8, (1, 1, 1))
    torch.save({"state_dict": net.state_dict(), "options": net.options | options}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"a.pth .*{reason}"):
        load_network(tmp_path / "a.pth")


def test_checkpoints_whose_names_count_too_far_are_refused(tmp_path):
    weights = MultiscaleNet(8, (1, 1, 1)).state_dict()
    torch.save(weights | {"latent_small.999999999.norm1.body.weight": torch.ones(8)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a.pth .*more blocks than the file has weights"):
        load_network(tmp_path / "a.pth")


SOAK = """
import os, re, sys
from pathlib import Path
import test as script
import utils.inference

def state():
    kib = int(re.search(r"VmRSS:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
    return kib / 1024, len(os.listdir("/proc/self/fd"))

seen = []
write = script.write_picture
def watched(path, picture, quality):
    write(path, picture, quality)
    seen.append(state())
script.write_picture = watched
script.main(["--input_dir", sys.argv[1], "--weights", sys.argv[2], "--output_dir", sys.argv[3]])
print(len(seen), *seen[200], *seen[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of memory")
def test_thousands_of_pictures_need_no_more_than_hundreds(tmp_path, narrow_weights, capsys):
    (tmp_path / "in").mkdir()
    for i in range(2000):
        (tmp_path / "in" / f"{i}.png").write_bytes(encoded())
    command = [sys.executable, "-c", SOAK, tmp_path / "in", narrow_weights, tmp_path / "out"]
    run = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    count, memory, files, memory_after, files_after = map(float, run.stdout.split()[-5:])
    counts = f"{memory:.0f} and {memory_after:.0f} MiB, {files:.0f} and {files_after:.0f} open files"
    with capsys.disabled():
        print(f"\nafter 200 and 2000 pictures: {counts}")
    assert count == 2000 and memory_after < memory + 20 and files_after <= files + 2
