import contextlib
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import test as script
from evaluations.metrics import psnr_ssim
from tests.conftest import ROOT, failure, make_pairs, random_picture, save_narrow
from utils.derain import Derainer
from utils.files import UserError
from utils.pictures import Picture, read_image, write_picture, write_png

PIXELS = random_picture(40, 56)


@pytest.fixture
def photos(tmp_path):
    """A folder tree of three pictures."""
    for name in ("a.png", "b.jpg", "sub/c.bmp"):
        write_picture(tmp_path / "photos" / name, Picture(PIXELS))
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path, narrow_weights):
    """Runs test.py on sources with a narrow network -> the names of the pictures and tables in out/."""

    def run_script(source, *options):
        out = tmp_path / "out"
        common = ["--weights", str(narrow_weights), "--output_dir", str(out), "--win_size", "32"]
        script.main(["--input_dir", *map(str, np.atleast_1d(source)), *common, *map(str, options)])
        names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        return [name for name in names if name != "settings.json"]

    return run_script


def measured(folder):
    """-> dict of name: dict of column: number, from the table in out/."""
    with open(folder / "out" / "psnr_ssim.csv", newline="") as file:
        return {row.pop("picture"): {name: float(text) for name, text in row.items()} for row in csv.DictReader(file)}


@contextlib.contextmanager
def disk_with_room_for(size):
    """As on a full disk, no file can grow beyond that number of bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_tree_is_derained_under_its_names(run, photos, narrow_net, tmp_path, capsys):
    for name in ("clip.mp4", "notes.txt", "raw.dng"):
        (photos / name).touch()
    (photos / "linked").symlink_to(photos / "sub")
    assert run(photos) == ["a.png", "b.png", "sub/c.png"]
    expected = Derainer(narrow_net, "tile", 32)(read_image(photos / "b.jpg"))
    assert np.array_equal(read_image(tmp_path / "out" / "b.png"), expected)
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert "a network of width 8" in first and "cpu" in first and "--mode tile" in first
    assert second == "skipped: 1 clip, 2 files of unknown kind, 1 linked folder"
    assert last.startswith("3 files derained in ") and last.endswith(f"-> {tmp_path / 'out'}")


def test_files_and_patterns_are_derained(run, photos):
    assert run(photos / "b.jpg") == ["b.png"]
    assert run([photos / "a.png", photos / "a.png", photos / "sub" / "c.bmp"]) == ["a.png", "b.png", "c.png"]
    assert run(f"{photos}/*/*.bmp")[-1] == "sub/c.png"


def test_results_go_to_a_folder_named_after_the_input():
    for root, expected in (("x/Rain200L/test/input", "Rain200L"), ("x/album", "album"), ("/input", "")):
        assert script.default_output_dir(f"{root}/*.png", root) == Path("results", expected)
    assert script.default_output_dir(__file__, root) == Path("results")


def test_test_sets_get_the_published_windows_and_photographs_tiles(run, tmp_path, capsys, narrow_net):
    for folder, mode in (("Rain12/test", "window"), ("photos", "tile"), ("Rain12/mine", "tile")):
        pairs = make_pairs(tmp_path / folder, count=1)
        for source in (pairs, pairs / "input"):  # a data set's folder stands for the rainy pictures in it
            assert run(source) == ["0.png"]
            assert f"--mode {mode}" in capsys.readouterr().out
        expected = Derainer(narrow_net, mode, 32)(read_image(pairs / "input" / "0.png"))
        assert np.array_equal(read_image(tmp_path / "out" / "0.png"), expected)
    run(pairs, "--target_dir", pairs)
    assert "--mode window" in capsys.readouterr().out
    run(pairs, "--target_dir", pairs, "--mode", "whole")
    assert "--mode whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    "folder, options, protocol",
    [("pairs", (), "rain200"), ("DID-Data/test", (), "did"), ("DID-Data/test", ("--protocol", "rain200"), "rain200")],
)
def test_psnr_and_ssim_are_printed_written_and_shown(run, tmp_path, capsys, folder, options, protocol):
    pairs, panel = make_pairs(tmp_path / folder, count=2), tmp_path / "panel.png"
    names = run(pairs, "--target_dir", pairs, "--panel", panel, *options)
    assert names == ["0.png", "1.png", "psnr_ssim.csv"]
    printed, rows = capsys.readouterr().out, measured(tmp_path)
    assert list(rows) == ["0.png", "1.png"]
    for name, row in rows.items():
        clean = read_image(pairs / "target" / name)
        for column, results in (("rainy", pairs / "input"), ("derained", tmp_path / "out")):
            expected = psnr_ssim(read_image(results / name), clean, protocol)
            assert (row[f"psnr_{column}"], row[f"ssim_{column}"]) == pytest.approx(expected)
            assert f"{expected[0]:.2f}" in printed
    mean = np.mean([row["psnr_derained"] for row in rows.values()])
    assert f"{mean:.2f}" in printed and f"2 pictures; Y channel, protocol {protocol}" in printed
    sheet = read_image(panel)
    for left, folder in zip((8, 64, 120), (pairs / "input", tmp_path / "out", pairs / "target")):
        assert np.array_equal(sheet[8:48, left : left + 48], read_image(folder / "0.png"))


def test_pairs_that_do_not_fit_are_listed_and_the_others_measured(run, photos, tmp_path, capsys):
    pairs = make_pairs(tmp_path / "pairs", count=3)
    message = failure(run, photos, "--target_dir", pairs / "target")
    assert f"no picture has a clean one of the same name in {pairs / 'target'}" in message
    shutil.copy(pairs / "target" / "2.png", pairs / "target" / "2.jpg")
    assert "same name: keep one of each.\n" in failure(run, pairs / "input", "--target_dir", pairs / "target")
    assert not (tmp_path / "out").exists()
    (pairs / "target" / "2.jpg").unlink()
    write_png(pairs / "target" / "0.png", np.zeros((20, 20, 3), np.uint8))
    (pairs / "target" / "1.png").unlink()
    message = failure(run, pairs / "input", "--target_dir", pairs / "target")
    assert "error: 2 of 3 files failed" in message
    assert f"{pairs / 'input' / '0.png'} (48×40)" in message and "input/1.png has no clean picture" in message
    assert "3 files derained" in capsys.readouterr().out
    assert list(measured(tmp_path)) == ["2.png"]
    (tmp_path / "out" / "psnr_ssim.csv").unlink()
    failure(run, pairs / "input", "--target_dir", pairs / "target", "--skip_existing")
    assert "3 kept" in capsys.readouterr().out and list(measured(tmp_path)) == ["2.png"]


def test_broken_pictures_do_not_stop_the_others(run, photos, tmp_path, capsys):
    (photos / "a.png").write_bytes((photos / "a.png").read_bytes()[:600])
    (photos / "z.png").symlink_to("nowhere")
    (tmp_path / "out" / "b.png").mkdir(parents=True)
    message = failure(run, photos)
    assert message.startswith("error: 3 of 4 files failed:") and "b.png cannot be written" in message
    assert f"{photos / 'a.png'} cannot be read" in message and f"{photos / 'z.png'} does not exist" in message
    assert "1 file derained" in capsys.readouterr().out
    assert read_image(tmp_path / "out" / "sub" / "c.png").shape == PIXELS.shape
    assert "error: 1 of 1 files failed" in failure(run, photos / "a.png")


def test_results_overwrite_neither_what_was_given_nor_each_other(run, photos, tmp_path):
    write_png(photos / "b.png", np.zeros((20, 20, 3), np.uint8))
    assert "b.png: rename one of them" in failure(run, photos)
    write_png(tmp_path / "clean" / "c.png", np.zeros((40, 56, 3), np.uint8))
    before = {path: path.read_bytes() for folder in (photos, tmp_path / "clean") for path in folder.rglob("*.*")}
    for source, options, message in (
        (f"{photos}/*.jpg", ["--output_dir", photos], "holds the inputs"),  # b.png is not given
        (photos / "a.png", ["--output_dir", photos], "holds the inputs"),
        (photos / "sub", ["--output_dir", tmp_path / "clean", "--target_dir", tmp_path / "clean"], "would overwrite"),
        (photos / "sub", ["--target_dir", tmp_path / "clean", "--panel", tmp_path / "clean/c.png"], "would overwrite"),
    ):
        assert message in failure(run, source, *options)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_grey_alpha_and_sixteen_bits_are_kept(run, tmp_path):
    grey = PIXELS[..., 0]
    (tmp_path / "in").mkdir()
    Image.fromarray(np.uint16(grey) * 257).save(tmp_path / "in" / "I;16.tif")
    for mode in ("L", "LA", "RGBA"):
        Image.fromarray(grey).convert(mode).save(tmp_path / "in" / f"{mode}.tif")
    names = run(tmp_path / "in")
    assert len(names) == 4
    for name in names:
        with Image.open(tmp_path / "out" / name) as result:
            assert f"{result.mode}.png" == name and result.size == (56, 40)


def test_the_format_is_kept_on_request(run, photos, tmp_path):
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(photos / "d.gif")
    assert run(photos, "--keep_format") == ["a.png", "b.jpg", "d.png", "sub/c.bmp"]
    best = (tmp_path / "out" / "b.jpg").stat().st_size
    run(photos, "--keep_format", "--quality", "20")
    assert (tmp_path / "out" / "b.jpg").stat().st_size < 0.6 * best


def test_existing_results_are_kept_if_made_with_the_same_weights_and_settings(run, photos, tmp_path, capsys):
    def remade(*options):
        """Whether a result newer than settings.json is made again."""
        write_png(tmp_path / "out" / "b.png", PIXELS[:8])
        run(photos, "--skip_existing", *options)
        printed, kept = capsys.readouterr().out, len(read_image(tmp_path / "out" / "b.png")) == 8
        assert ("0 files derained" in printed) == ("3 kept" in printed) == kept
        return not kept

    other_weights = save_narrow(tmp_path / "weights.pth", seed=1)
    assert remade() and not remade()
    for options in (("--weights", other_weights), ("--steady",), ()):
        assert remade(*options) and not remade(*options)
    for name in ("bf16", "ensemble"):
        assert remade(f"--{name}") and json.loads((tmp_path / "out" / "settings.json").read_text())[name]
    run(photos)
    capsys.readouterr()
    album = shutil.copytree(photos, tmp_path / os.fsdecode(b"caf\xe9"))  # which holds the same names
    for expected in ("3 files derained", "3 kept"):
        run(album, "--skip_existing")
        assert expected in capsys.readouterr().out


def test_clips_are_derained_by_name_and_pattern(run, photos, tmp_path, monkeypatch, capsys):
    def derain_clip(path, output, derainer, steady, progress):
        if path.name == "c.mov":
            raise UserError(f"{path} cannot be read as a video.")
        output.write_text(f"{path.name} {derainer.window} {steady}")

    monkeypatch.setattr("utils.video.derain_clip", derain_clip)
    for name in ("a.mp4", "b.webm", "c.mov"):
        (photos / name).touch()
    message = failure(run, [photos / "a.mp4", f"{photos}/*"], "--steady")
    assert "1 of 5 files failed" in message and "c.mov cannot be read as a video" in message
    assert "4 files derained" in capsys.readouterr().out
    assert (tmp_path / "out" / "b.webm.mp4").read_text() == "b.webm 32 True"
    for _ in range(2):  # the second time the pattern also matches the first result
        run(f"{tmp_path}/*/a.mp4")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_a_hint_and_leave_nothing_half_written(run, tmp_path, monkeypatch, capsys, number):
    pairs, shares = make_pairs(tmp_path / "pairs", count=8), []

    def interrupted_update(bar, share):
        shares.append(share)
        if sum(shares) > 2.4:  # while the third picture is computed
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(script.tqdm, "update", interrupted_update)
        assert failure(run, pairs / "input") == str(128 + number)
    assert "stopped: what was finished is kept. With --skip_existing" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "settings.json"]
    assert len(run(pairs / "input", "--skip_existing")) == 8
    assert "2 kept" in capsys.readouterr().out


def test_several_processes_share_the_pictures(run, photos, monkeypatch, capsys):
    (photos / "a.png").write_bytes(b"broken")
    write_png(photos / "d.png", PIXELS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(photos) == ["b.png", "sub/c.png"]
    assert "2 files derained" in (printed := capsys.readouterr().out) and "--mode" not in printed
    monkeypatch.setenv("RANK", "0")
    assert "1 of 2 files failed" in failure(run, photos)
    assert run(photos / "d.png") == ["b.png", "d.png", "sub/c.png"]
    assert "python -m evaluations.evaluate" in failure(run, photos, "--target_dir", photos)


def test_under_torchrun_a_broken_picture_does_not_end_the_other_processes(tmp_path, narrow_weights):
    pairs = make_pairs(tmp_path / "pairs", count=8, size=(256, 480))
    for i in (0, 2, 4, 6):  # the first process has failed long before the second one is done
        (pairs / "input" / f"{i}.png").write_bytes(b"broken")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "test.py"]
    options = ["--input_dir", pairs / "input", "--weights", narrow_weights, "--output_dir", tmp_path / "out"]
    result = subprocess.run([*torchrun, *options], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "4 of 4 files failed" in result.stderr and "stopped" not in result.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"1.png", "3.png", "5.png", "7.png"}


def test_earlier_results_in_the_input_folder_are_no_inputs(run, photos, capsys):
    for _ in range(2):
        run(photos, "--output_dir", photos / "derained")
        assert "3 files derained" in (printed := capsys.readouterr().out) and "skipped" not in printed


def test_warnings_are_printed(run, photos, monkeypatch, capsys):
    monkeypatch.setattr("utils.devices.cpu_warnings", lambda gpus: [f"WARNING: {gpus}"])
    monkeypatch.setattr("utils.devices.has_bfloat16", lambda device: False)
    run(photos / "a.png", "--gpus", "cpu")
    assert "\nWARNING: cpu\n" in (printed := capsys.readouterr().out) and "bfloat16" not in printed
    run(photos / "a.png", "--bf16")
    assert "this processor only emulates bfloat16" in capsys.readouterr().out


def test_wrong_outputs_and_options_are_named(run, photos, tmp_path, capsys):
    (tmp_path / "file.txt").touch()
    for source, options, message in (
        (photos, ("--compile", "--mode", "whole"), "not whole with --compile"),
        (photos, ("--output_dir", photos / "sub/.."), "holds the inputs: choose another"),
        (photos, ("--output_dir", tmp_path / "file.txt"), "file.txt names a file: give a folder"),
        (photos / "a.png", ("--output_dir", tmp_path / "out.png"), "out.png names a file: give a folder"),
    ):
        assert message in failure(run, source, *options)
    assert failure(run, photos, "--panel", "a.png") == "2"
    assert "give their folder with --target_dir" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and len(list(photos.rglob("*"))) == 4


def test_a_full_disk_stops_at_once_and_leaves_no_half_picture(run, photos, tmp_path):
    with disk_with_room_for(2000):
        message = failure(run, photos)
    assert "a.png cannot be written" in message and "files failed" not in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_the_script_itself_prints_its_own_sentences_only(tmp_path, narrow_weights):
    """With a name that is not Unicode, as from a zip file, and a file about which the decoders have things to say."""
    name, folder = os.fsdecode("雨.png".encode("shift-jis")), tmp_path / "in"
    write_png(folder / name, PIXELS)
    tifffile.imwrite(folder / "broken.tif", random_picture(64, 64, dtype=np.uint16))
    os.truncate(folder / "broken.tif", 9000)
    options = ["--target_dir", folder, "--output_dir", tmp_path / "out", "--weights", narrow_weights]
    command = [sys.executable, "test.py", "--input_dir", folder, *options]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and "\\udc89J.png" in result.stdout
    assert os.fsencode(name) in (tmp_path / "out" / "psnr_ssim.csv").read_bytes()
    assert "error: 1 of 2 files failed:\n" in result.stderr and "Traceback" not in result.stderr
    (sentence,) = [line for line in result.stderr.splitlines() if "tif" in line.lower()]  # warnings of others may stand
    assert "broken.tif cannot be read" in sentence


def test_odd_names_are_kept(run, tmp_path):
    names = ["A.PNG", "a\nb.png", "-rf.png", "雨 ☔ é.png", "a[1]*?.png", "x" * 251 + ".png", "a.b.c..png", "png.jpg"]
    (tmp_path / "in").mkdir()
    for name in names:
        Image.fromarray(PIXELS).save(tmp_path / "in" / name, "PNG")
    assert set(run(tmp_path / "in")) == {str(Path(name).with_suffix(".png")) for name in names}
