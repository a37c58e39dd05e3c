"""test.py from end to end, also on what people feed to it without meaning to."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import test as script
from ablations import build
from evaluations.metrics import psnr_ssim
from tests.conftest import make_pairs
from utils import video
from utils.checkpoint import load_network, save_checkpoint
from utils.derain import Derainer
from utils.files import UserError
from utils.pictures import read_image, write_png

ROOT = Path(__file__).parent.parent
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path):
    """A folder tree of three pictures."""
    for name in ("a.png", "b.jpg", "sub/c.bmp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(path)
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


def failure(run, *args):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    return str(caught.value.code)


def measured(folder):
    """-> dict of name: dict of column: number, from the table in out/."""
    with open(folder / "out" / "psnr_ssim.csv", newline="") as file:
        return {row.pop("picture"): {name: float(text) for name, text in row.items()} for row in csv.DictReader(file)}


def encoded(kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def test_a_tree_is_derained_under_its_names(run, photos, narrow_weights, tmp_path, capsys):
    assert run(photos) == ["a.png", "b.png", "sub/c.png"]
    expected = Derainer(load_network(narrow_weights), "tile", 32)(read_image(photos / "b.jpg"))
    assert np.array_equal(read_image(tmp_path / "out" / "b.png"), expected)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "a network of width 8" in first and "cpu" in first and "--mode tile" in first
    assert last.startswith("3 files derained in ") and last.endswith(f"-> {tmp_path / 'out'}")


def test_files_and_patterns_are_derained(run, photos):
    assert run(photos / "b.jpg") == ["b.png"]
    assert run([photos / "a.png", photos / "a.png", photos / "sub" / "c.bmp"]) == ["a.png", "b.png", "c.png"]
    assert run(f"{photos}/*/*.bmp")[-1] == "sub/c.png"


@pytest.mark.parametrize(
    "root, expected", [("x/Rain200L/test/input", "Rain200L"), ("x/album", "album"), ("/input", "")]
)
def test_results_go_to_a_folder_named_after_the_input(root, expected):
    assert script.default_output_dir(f"{root}/*.png", root) == Path("results", expected)
    assert script.default_output_dir(__file__, root) == Path("results")


def test_test_sets_get_the_published_windows_and_photographs_tiles(run, tmp_path, capsys, narrow_weights):
    for folder, mode in (("Rain12/test", "window"), ("photos", "tile"), ("Rain12/mine", "tile")):
        pairs = make_pairs(tmp_path / folder, count=1)
        for source in (pairs, pairs / "input"):  # a data set's folder stands for the rainy pictures in it
            assert run(source) == ["0.png"]
            assert f"--mode {mode}" in capsys.readouterr().out
        expected = Derainer(load_network(narrow_weights), mode, 32)(read_image(pairs / "input" / "0.png"))
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
    assert sheet.shape[1] > 3 * 48 and sheet.shape[0] > 2 * 40


def test_the_wrong_clean_pictures_are_noticed_before_the_work(run, tmp_path, photos):
    clean = make_pairs(tmp_path / "pairs", count=2) / "target"
    assert f"none of the pictures has a clean one of its name in {clean}" in failure(run, photos, "--target_dir", clean)
    assert not (tmp_path / "out").exists()


def test_pairs_that_do_not_fit_are_listed_and_the_others_measured(run, tmp_path, capsys):
    pairs = make_pairs(tmp_path / "pairs", count=3)
    write_png(pairs / "target" / "0.png", np.zeros((20, 20, 3), np.uint8))
    (pairs / "target" / "1.png").unlink()
    message = failure(run, pairs / "input", "--target_dir", pairs / "target")
    assert "error: 2 of 3 files failed" in message
    assert f"{pairs / 'input' / '0.png'} (48×40)" in message and "input/1.png has no clean picture" in message
    assert "3 files derained" in capsys.readouterr().out
    assert list(measured(tmp_path)) == ["2.png"]


def test_broken_pictures_do_not_stop_the_others(run, photos, tmp_path, capsys):
    (photos / "a.png").write_bytes(encoded()[:600])
    (photos / "y.png").symlink_to("y.png")
    (photos / "z.png").symlink_to("nowhere")
    (tmp_path / "out" / "b.png").mkdir(parents=True)
    message = failure(run, photos)
    assert message.startswith("error: 4 of 5 files failed:") and "b.png cannot be written" in message
    assert all(f"{photos / name} cannot be read as a picture" in message for name in ("a.png", "y.png"))
    assert f"{photos / 'z.png'} does not exist" in message
    assert "1 file derained" in capsys.readouterr().out
    assert read_image(tmp_path / "out" / "sub" / "c.png").shape == PIXELS.shape
    assert "error: 1 of 1 files failed" in failure(run, photos / "a.png")


def test_results_overwrite_neither_what_was_given_nor_each_other(run, photos, tmp_path):
    write_png(photos / "b.png", np.zeros((20, 20, 3), np.uint8))
    assert "b.png: rename one of them" in failure(run, photos)
    write_png(tmp_path / "clean" / "c.png", np.zeros((40, 56, 3), np.uint8))
    before = {path: path.read_bytes() for folder in (photos, tmp_path / "clean") for path in folder.rglob("*.*")}
    for source, options in (
        (f"{photos}/*", ["--output_dir", photos]),
        (photos / "a.png", ["--output_dir", photos, "--target_dir", photos]),
        (photos / "sub", ["--output_dir", tmp_path / "clean", "--target_dir", tmp_path / "clean"]),
        (photos / "sub", ["--target_dir", tmp_path / "clean", "--panel", tmp_path / "clean" / "c.png"]),
    ):
        assert "would overwrite" in failure(run, source, *options)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I;16"])
def test_grey_alpha_and_sixteen_bits_are_kept(run, tmp_path, mode):
    grey = PIXELS[..., 0]
    picture = Image.fromarray(np.uint16(grey) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    picture.save(tmp_path / "odd.tif")
    run(tmp_path / "odd.tif")
    with Image.open(tmp_path / "out" / "odd.png") as result:
        assert result.mode == mode and result.size == picture.size


def test_the_format_is_kept_on_request(run, photos, tmp_path):
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(photos / "d.gif")
    assert run(photos, "--keep_format") == ["a.png", "b.jpg", "d.png", "sub/c.bmp"]
    best = (tmp_path / "out" / "b.jpg").stat().st_size
    run(photos, "--keep_format", "--quality", "20")
    assert (tmp_path / "out" / "b.jpg").stat().st_size < 0.6 * best
    (photos / "e.jpg").write_bytes(encoded("PNG", "RGBA"))
    assert "holds no alpha" in failure(run, photos / "e.jpg", "--keep_format")
    assert run(photos / "e.jpg")[-2:] == ["e.png", "sub/c.bmp"]


def test_existing_results_are_kept_if_made_with_the_same_weights_and_settings(run, photos, tmp_path, capsys):
    weights = tmp_path / "weights.pth"

    def remade(*options):
        """Whether a result newer than settings.json is made again."""
        Image.new("RGB", (8, 8)).save(tmp_path / "out" / "b.png")
        run(photos, "--skip_existing", "--weights", weights, *options)
        kept = read_image(tmp_path / "out" / "b.png").shape == (8, 8, 3)
        assert ("0 files derained" in (printed := capsys.readouterr().out)) == ("3 kept" in printed) == kept
        return not kept

    (tmp_path / "out").mkdir()
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_checkpoint(weights, state_dict=build(dim=8, num_blocks=(1, 1, 1)).state_dict())
        assert remade() and not remade()
    assert remade("--mode", "window") and not remade("--mode", "window")
    assert remade("--bf16") and remade("--steady") and remade()
    (tmp_path / "out" / "sub" / "c.png").unlink()
    run(photos, "--skip_existing", "--weights", weights)
    assert "1 file derained" in (printed := capsys.readouterr().out) and "2 kept" in printed


def test_kept_results_are_measured(run, tmp_path):
    pairs = make_pairs(tmp_path / "pairs", count=3)
    options = ("--skip_existing", "--target_dir", pairs / "target")
    run(pairs / "input", *options)
    shutil.copy(pairs / "target" / "1.png", tmp_path / "out" / "1.png")
    (tmp_path / "out" / "2.png").unlink()
    run(pairs / "input", *options)
    psnr = {name: row["psnr_derained"] for name, row in measured(tmp_path).items()}
    assert psnr["1.png"] == float("inf") and psnr["0.png"] < 60 and psnr["2.png"] < 60


def test_what_a_folder_holds_besides_pictures_is_mentioned(run, photos, capsys):
    for name in ("clip.mp4", "notes.txt", "raw.dng"):
        (photos / name).touch()
    (photos / "linked").symlink_to(photos / "sub")
    assert run(photos) == ["a.png", "b.png", "sub/c.png"]
    assert "\nskipped: 1 clip, 2 files of unknown kind, 1 linked folder\n" in capsys.readouterr().out


def test_clips_are_derained_by_name_and_pattern(run, photos, tmp_path, monkeypatch, capsys):
    def derain_clip(path, output, derainer, steady, progress):
        if path.name == "c.mov":
            raise UserError(f"{path} cannot be read as a video.")
        output.write_text(f"{path.name} {derainer.window} {steady}")

    monkeypatch.setattr(video, "derain_clip", derain_clip)
    for name in ("a.mp4", "b.webm", "c.mov"):
        (photos / name).touch()
    message = failure(run, [photos / "a.mp4", f"{photos}/*"], "--steady")
    assert "1 of 5 files failed" in message and "c.mov cannot be read as a video" in message
    assert "4 files derained" in capsys.readouterr().out
    assert (tmp_path / "out" / "b.webm.mp4").read_text() == "b.webm 32 True"
    run(f"{photos}/*.mp4", "--steady", "--skip_existing")
    assert "1 kept" in capsys.readouterr().out
    run(photos / "a.mp4", "--skip_existing")
    assert (tmp_path / "out" / "a.mp4").read_text() == "a.mp4 32 False"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_a_hint_and_leave_nothing_half_written(run, tmp_path, monkeypatch, capsys, number):
    pairs, write = make_pairs(tmp_path / "pairs", count=8), video.pictures.write_picture

    def interrupted(path, picture, quality):
        write(path, picture, quality)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(video.pictures, "write_picture", interrupted)
    assert failure(run, pairs / "input") == str(128 + number)
    assert "stopped: what was finished is kept. With --skip_existing" in capsys.readouterr().err
    results = sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != "settings.json")
    assert 1 <= len(results) < 8 and all(name.endswith(".png") for name in results)
    monkeypatch.setattr(video.pictures, "write_picture", write)
    assert len(run(pairs / "input", "--skip_existing")) == 8
    assert f"{len(results)} kept" in capsys.readouterr().out


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


def test_the_output_folder_may_lie_in_the_input_folder_or_around_it(run, photos, capsys):
    for _ in range(2):  # earlier results are no inputs
        run(photos, "--output_dir", photos / "derained")
        assert "3 files derained" in (printed := capsys.readouterr().out) and "skipped" not in printed
    assert (photos / "derained" / "sub" / "c.png").is_file()
    run(photos / "sub", "--output_dir", photos)
    assert (photos / "c.png").is_file()


def test_notes_are_printed(run, photos, narrow_weights, monkeypatch, capsys):
    monkeypatch.setattr(script, "cpu_warnings", lambda gpus: [f"WARNING: {gpus}"])
    run(photos / "a.png", "--ensemble", "--gpus", "cpu")
    assert "\nWARNING: cpu\n" in (printed := capsys.readouterr().out) and "--ensemble may lower" not in printed
    monkeypatch.setattr(script, "OWN_WEIGHTS", narrow_weights)
    run(photos / "a.png", "--ensemble")
    assert "--ensemble may lower quality" in capsys.readouterr().out


def test_wrong_sources_outputs_weights_and_devices_are_named(run, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    for source, options, message in (
        (tmp_path / "nowhere", (), "nowhere does not exist"),
        (tmp_path / "empty", (), "empty holds no pictures"),
        (photos, ("--weights", photos / "a.png"), "a.png cannot be read as a checkpoint"),
        (photos, ("--gpus", "0"), "sees 0 GPUs here"),
        (photos, ("--win_size", "100"), "must be a multiple of 16"),
        (photos, ("--compile", "--mode", "whole"), "not whole with --compile"),
        (photos, ("--output_dir", photos / "sub/.."), "is the input folder: choose another"),
        (photos, ("--output_dir", tmp_path / "empty.txt"), "empty.txt names a file: give a folder"),
        (photos / "a.png", ("--output_dir", tmp_path / "out.png"), "out.png names a file: give a folder"),
        (photos, ("--output_dir", tmp_path / "empty.txt" / "x"), "choose another folder"),
    ):
        assert message in failure(run, source, *options)
    assert failure(run, photos, "--panel", "a.png") == "2"
    assert "give their folder with --target_dir" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and len(list(photos.rglob("*"))) == 4


def test_a_full_disk_stops_at_once_and_leaves_no_half_picture(photos, narrow_weights, tmp_path):
    command = "import resource, test; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); test.main()"
    options = ["--input_dir", photos, "--weights", narrow_weights, "--output_dir", tmp_path / "out"]
    result = subprocess.run([sys.executable, "-c", command, *options], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "a.png cannot be written" in result.stderr and "files failed" not in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_the_script_itself_prints_its_own_sentences_only(tmp_path, narrow_weights):
    """With a name that is not Unicode, as from a zip file, and a file about which the decoders have things to say."""
    name, folder = os.fsdecode("雨.png".encode("shift-jis")), tmp_path / "in"
    write_png(folder / name, PIXELS)
    tifffile.imwrite(folder / "broken.tif", np.random.default_rng(0).integers(0, 65535, (64, 64, 3), np.uint16))
    os.truncate(folder / "broken.tif", 9000)
    options = ["--target_dir", folder, "--output_dir", tmp_path / "out", "--weights", narrow_weights]
    command = [sys.executable, "test.py", "--input_dir", folder, *options]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and "\\udc89J.png" in result.stdout
    assert os.fsencode(name) in (tmp_path / "out" / "psnr_ssim.csv").read_bytes()
    assert result.stderr.startswith("error: 1 of 2 files failed:\n") and "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 2 and "broken.tif cannot be read" in result.stderr


ODD_FILES = {  # what it is: (its name, how it is made, whether it is derained or else ignored)
    "wrong ending": ("a.jpg", lambda path: path.write_bytes(encoded("PNG")), True),
    "upper-case ending": ("A.PNG", lambda path: path.write_bytes(encoded()), True),
    "unknown ending": ("a.doc", lambda path: path.write_bytes(encoded()), False),
    "hidden file": (".a.png", lambda path: path.write_bytes(encoded()), False),
    "folder that links to itself": ("sub", lambda path: path.symlink_to("."), False),
    "folder named like a picture": ("a.png", lambda path: path.mkdir(), False),
    "newline in the name": ("a\nb.png", lambda path: path.write_bytes(encoded()), True),
    "leading dash": ("-rf.png", lambda path: path.write_bytes(encoded()), True),
    "other scripts": ("雨 ☔ é.png", lambda path: path.write_bytes(encoded()), True),
    "brackets and stars": ("a[1]*?.png", lambda path: path.write_bytes(encoded()), True),
    "longest name": ("x" * 251 + ".png", lambda path: path.write_bytes(encoded()), True),
    "dots": ("a.b.c..png", lambda path: path.write_bytes(encoded()), True),
}


@pytest.mark.parametrize("name, make, derained", ODD_FILES.values(), ids=ODD_FILES)
def test_odd_files_beside_a_good_one(run, tmp_path, name, make, derained):
    write_png(tmp_path / "in" / "good.png", PIXELS)
    make(tmp_path / "in" / name)
    expected = {"good.png", str(Path(name).with_suffix(".png"))} if derained else {"good.png"}
    assert set(run(tmp_path / "in")) == expected
